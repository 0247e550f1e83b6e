"""PS-KD of heads with several outputs or losses: the one that predicts is taught, as recomputed from checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from helpers.mmengine import train
from helpers.mmseg import MAPS, config
from mmcv.ops import point_sample
from mmcv.transforms import BaseTransform
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import load_checkpoint
from mmseg.models.segmentors import BaseSegmentor
from mmseg.registry import MODELS, TRANSFORMS

PSKD = dict(type='selfkd_mmseg.PSKDHook', alpha=0.8, interval=2)
CE = dict(type='CrossEntropyLoss')
SIGMOID = dict(type='CrossEntropyLoss', use_sigmoid=True)
WEIGHTS = [0.2] + [1.0] * 9 + [2.0]
OHEM = dict(type='OhemCrossEntropy', thres=0.05, min_kept=500, class_weight=WEIGHTS)
BN = dict(type='BN')
SHARED = dict(num_classes=11, channels=16, norm_cfg=BN, dropout_ratio=0.0, align_corners=False)
LAST = dict(SHARED, in_channels=64, in_index=3)
FCN = dict(LAST, type='FCNHead', num_convs=1, loss_decode=dict(CE, loss_weight=0.4))
DDR = dict(type='DDRNet', channels=8, ppm_channels=8, norm_cfg=BN)
PID = dict(type='PIDNet', channels=8, ppm_channels=8, num_stem_blocks=1, num_branch_blocks=1, norm_cfg=BN)
PID['act_cfg'] = dict(type='ReLU', inplace=True)
FEW_POINTS = dict(num_points=64, oversample_ratio=3, importance_sample_ratio=0.75)
SUBDIVISION = dict(mode='whole', subdivision_steps=2, subdivision_num_points=32, scale_factor=2)


@TRANSFORMS.register_module()
class Binary(BaseTransform):
    """Two classes: background, and any digit."""

    def transform(self, results):
        labels = results['gt_seg_map']
        labels[(labels > 0) & (labels != 255)] = 1
        return results


class OfOthersParts(BaseSegmentor):
    """A segmentor that is no EncoderDecoder, as Open-CD's, with an entry of its own for each mode."""

    def __init__(self, backbone, decode_head, data_preprocessor, **unused):
        super().__init__(data_preprocessor)
        self.backbone, self.decode_head = MODELS.build(backbone), MODELS.build(decode_head)

    def extract_feat(self, inputs):
        return self.backbone(inputs)

    def encode_decode(self, inputs, metas):
        return self.decode_head.predict(self.backbone(inputs), metas, None)

    def loss(self, inputs, data_samples):
        return self.decode_head.loss(self.backbone(inputs), data_samples, None)

    def predict(self, inputs, data_samples=None):
        raise NotImplementedError

    def _forward(self, inputs, data_samples=None):
        return self.decode_head.forward(self.backbone(inputs))


# The model, which of the head's outputs is the prediction, which of its losses, and the losses that are left alone.
CASES = {
    'DANet': (dict(decode_head=dict(LAST, type='DAHead', pam_channels=8, loss_decode=CE)), 0, 0),
    'EncNet': (
        dict(decode_head=dict(SHARED, type='EncHead', in_channels=MAPS[1:], in_index=[1, 2, 3], loss_decode=CE)),
        0,
        0,
    ),
    'DDRNet': (
        dict(
            backbone=DDR,
            decode_head=dict(SHARED, type='DDRHead', in_channels=32, loss_decode=[OHEM, dict(OHEM, loss_weight=0.4)]),
        ),
        0,
        0,
    ),
    'PIDNet': (
        dict(
            backbone=PID,
            decode_head=dict(
                SHARED, type='PIDHead', in_channels=32, loss_decode=[CE, OHEM, dict(type='BoundaryLoss'), OHEM]
            ),
        ),
        1,
        1,
    ),
    'OCRNet': (
        dict(
            type='CascadeEncoderDecoder',
            num_stages=2,
            decode_head=[FCN, dict(LAST, type='OCRHead', ocr_channels=8, loss_decode=dict(CE, loss_weight=2.0))],
        ),
        0,
        0,
    ),
    'PointRend': (
        dict(
            type='CascadeEncoderDecoder',
            num_stages=2,
            decode_head=[
                FCN,
                dict(LAST, type='PointHead', in_channels=[8], in_index=[0], num_fcs=1, norm_cfg=None, loss_decode=CE),
            ],
            train_cfg=FEW_POINTS,
            test_cfg=SUBDIVISION,
        ),
        0,
        0,
    ),
    'sigmoid of each class': (dict(decode_head=dict(FCN, loss_decode=dict(SIGMOID, loss_weight=2.0))), 0, 0),
    'sigmoid, ignored pixels do not count': (
        dict(decode_head=dict(FCN, loss_decode=dict(SIGMOID, avg_non_ignore=True))),
        0,
        0,
    ),
    'sigmoid with one output': (dict(decode_head=dict(FCN, num_classes=2, out_channels=1, loss_decode=SIGMOID)), 0, 0),
    'segmentor of its own': (dict(type=OfOthersParts, decode_head=FCN), 0, 0),
}


class Losses(Hook):
    """Keeps the calls of the head's loss modules and the points that PointRend chose, and the logged values."""

    priority = 'VERY_HIGH'

    def __init__(self, place):
        self.place, self.steps = place, []

    def before_train(self, runner):
        head = runner.model.decode_head
        head = head[-1] if isinstance(head, torch.nn.ModuleList) else head
        losses = head.loss_decode
        module = losses[self.place] if isinstance(losses, torch.nn.ModuleList) else losses
        runner.model.register_forward_pre_hook(self._inputs, with_kwargs=True)
        module.register_forward_hook(self._loss)
        if hasattr(head, 'get_points_train'):
            compute = head.loss_by_feat
            head.loss_by_feat = lambda logits, points, samples: (
                self.steps[-1].update(points=points) or compute(logits, points, samples)
            )

    def _inputs(self, model, args, kwargs):
        if kwargs['mode'] == 'loss':
            self.steps.append(dict(inputs=kwargs['inputs'].clone()))

    def _loss(self, module, args, output):
        if 'plain' not in self.steps[-1]:  # the first call is that of the prediction
            self.steps[-1].update(logits=args[0].detach().clone(), label=args[1].clone(), plain=output.item())

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1].update(iter=runner.iter, outputs={k: v.item() for k, v in outputs.items() if v.numel() == 1})


def tiny(voc, folder, case):
    """Five iterations, a snapshot after every two."""
    cfg = config(voc, folder, PSKD, **{'train_cfg.max_iters': 5})
    model, place, loss = CASES[case]
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.model.pop('auxiliary_head')
    for name, part in model.items():
        cfg.model[name] = [ConfigDict(p) for p in part] if isinstance(part, list) else part
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline[2]['void'] = 'Ohem' not in str(model)
    if 'one output' in case:
        pipeline.insert(2, dict(type='Binary'))
    if 'PIDHead' in str(cfg.model.decode_head):
        pipeline.insert(-1, dict(type='GenerateEdge', edge_width=4))
    return cfg, place, loss


def expected_soft(case, step, past_logits):
    """The past's part of the loss, in double precision, without its alpha."""
    logits, label = step['logits'].double(), step['label']
    if 'points' in step:
        past = point_sample(past_logits, step['points'], align_corners=False).double()
    else:
        past = F.interpolate(past_logits, label.shape[1:], mode='bilinear').double()
    valid = label != 255
    if 'sigmoid' in case:
        target = past.sigmoid()
        each = -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)) * valid.unsqueeze(1)
        return each.sum() / (valid.sum() * logits.shape[1] if 'count' in case else each.numel())
    if 'OhemCrossEntropy' in str(CASES[case]):
        target = past.softmax(1) * torch.tensor(WEIGHTS).view(-1, 1, 1)
        each = -(target * logits.log_softmax(1)).sum(1).flatten()
        of_label = logits.softmax(1).gather(1, label.unsqueeze(1)).flatten()
        return each[of_label < of_label.sort().values[500].clamp(min=0.05)].mean()
    return (-(past.softmax(1) * logits.log_softmax(1)).sum(1) * valid).sum() / label.numel()


@pytest.mark.parametrize('case', CASES)
def test_loss_recomputed_from_earlier_checkpoints(voc, tmp_path, case):
    cfg, place, which = tiny(voc, tmp_path, case)
    runner = train(cfg, seen := Losses(which))
    teacher = MODELS.build(cfg.model).train()
    weight = 2.0 if case in ('OCRNet', 'sigmoid of each class') else 0.4 if case == 'segmentor of its own' else 1.0
    for step in seen.steps:
        since, logged = step['iter'] // 2 * 2, step['outputs']
        if not since:
            assert logged['pskd_hard'] == pytest.approx(step['plain'], rel=1e-5)
            continue
        load_checkpoint(teacher, str(tmp_path / f'iter_{since}.pth'), strict=True)
        with torch.no_grad():
            if 'points' in step:
                shape = step['inputs'].shape[2:]
                past = teacher.encode_decode(step['inputs'], [dict(img_shape=shape)] * 2)
            else:
                past = teacher(step['inputs'], mode='tensor')
        past = past if torch.is_tensor(past) else past[place]
        alpha = 0.8 * since / 5
        assert logged['pskd_alpha'] == pytest.approx(alpha)
        assert logged['pskd_hard'] == pytest.approx((1 - alpha) * step['plain'], rel=1e-4)
        assert logged['pskd_soft'] == pytest.approx(alpha * weight * float(expected_soft(case, step, past)), rel=1e-3)
        assert logged['pskd_entropy'] > 0
        parts = pytest.approx(logged['pskd_hard'] + logged['pskd_soft'], rel=1e-5)
        assert any('loss' in name and value == parts for name, value in logged.items())
    assert not any('get_points_train' in vars(module) for module in runner.model.modules())
