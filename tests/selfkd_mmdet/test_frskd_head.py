"""FRSKD in real MMDetection training runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from det_runs import CSKD, FRSKD, PSKD, bfloat16, config
from mm_runs import assert_same_state, train
from mmdet.registry import MODELS
from mmengine.hooks import Hook
from mmengine.runner import load_checkpoint

from selfkd.losses import attention_transfer
from selfkd.publish import publish_checkpoint, strip_self_teacher
from selfkd_mmdet import FRSKDRoIHead


class Watch(Hook):
    """Keeps the RoI head before each step, what it was given to classify, its classification, and the losses."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.steps = []

    def before_train(self, runner):
        head = runner.model.roi_head
        head.bbox_roi_extractor.register_forward_pre_hook(self._regions)
        head.bbox_head.loss_cls.register_forward_hook(self._loss, with_kwargs=True)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        head = runner.model.roi_head
        self.steps.append({'head': copy.deepcopy(head)})
        for module in self.steps[-1]['head'].modules():
            module._forward_hooks.clear(), module._forward_pre_hooks.clear()

    def _regions(self, module, args):
        (
            self.steps[-1].setdefault('regions', tuple(f.detach() for f in args[0])),
            self.steps[-1].setdefault('rois', args[1]),
        )

    def _loss(self, module, args, kwargs, output):
        self.steps[-1].update(logits=args[0].detach(), label=args[1])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1]['outputs'] = {k: v.item() for k, v in outputs.items()}


@pytest.mark.parametrize('case', ['faster-rcnn', 'mask', 'beta 0'])
def test_losses_recomputed(voc, tmp_path, case):
    """Every term of every step in the paper's words; the self-teacher itself learns from the labels alone."""
    options = {
        'model.roi_head.temperature': 4.0,
        'model.roi_head.alpha': 1.5,
        'model.roi_head.beta': 0.0 if case == 'beta 0' else 30.0,
    }
    options['train_cfg.max_epochs'] = 1
    model = 'mask' if case == 'mask' else 'faster-rcnn'
    train(config(voc, tmp_path, model=model, **FRSKD, **options), watch := Watch())
    for step in watch.steps:
        head, feats = step['head'], step['regions']
        maps = head.self_teacher['pyramid'](feats)
        pooled = head.self_teacher['roi_extractor'](maps, step['rois']).mean((2, 3))
        t, z, y = head.self_teacher['bbox_head'].fc_cls(pooled), step['logits'].requires_grad_(), step['label']
        p, q = F.softmax(t / 4, 1), F.softmax(z / 4, 1)
        expected = {
            'loss_teacher': F.cross_entropy(t, y),
            'loss_kd': 1.5 * 16 * (p * (p / q).log()).sum(1).mean(),
            'loss_feature': 30 * sum(attention_transfer(f, m) for f, m in zip(feats, maps)),
        }
        if case == 'beta 0':
            del expected['loss_feature']
            assert 'loss_feature' not in step['outputs']
        for name, value in expected.items():
            assert step['outputs'][name] == pytest.approx(value.item(), rel=1e-3), name
        assert (y < 10).any()
        assert ('loss_mask' in step['outputs']) == (case == 'mask')


def test_only_the_labels_teach_the_self_teacher_and_both_teach_the_network(voc, tmp_path):
    class Gradients(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            model = runner.model
            losses = model(**model.data_preprocessor(data_batch, True), mode='loss')
            teacher = list(model.roi_head.self_teacher.parameters())
            taught = losses['loss_kd'] + losses['loss_feature']
            self.from_taught = torch.autograd.grad(taught, teacher, retain_graph=True, allow_unused=True)
            self.from_labels = torch.autograd.grad(
                losses['loss_teacher'], teacher, retain_graph=True, allow_unused=True
            )
            stem = model.backbone.conv1.weight
            for name in ('loss_teacher', 'loss_kd', 'loss_feature'):
                (gradient,) = torch.autograd.grad(losses[name], stem, retain_graph=True)
                assert gradient.abs().sum() > 0, name

    train(config(voc, tmp_path, **FRSKD, **{'train_cfg.max_epochs': 1}), watch := Gradients())
    assert all(g is None for g in watch.from_taught)
    assert all(g is not None for g in watch.from_labels)


def test_first_step_has_the_vanilla_losses(voc, tmp_path):
    """From the same seed the network starts the same, and its own losses are MMDetection's own."""

    class First(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 0:
                self.losses = {k: v for k, v in outputs.items() if 'loss_' in k}

    hooks = First(), First()
    for hook, options in zip(hooks, ({}, FRSKD)):
        train(config(voc, tmp_path / str(len(options)), **options, **{'train_cfg.max_epochs': 1}), hook)
    vanilla, ours = (hook.losses for hook in hooks)
    assert set(ours) - set(vanilla) == {'loss_teacher', 'loss_kd', 'loss_feature'}
    assert_same_state({name: ours[name] for name in vanilla}, vanilla)


def test_published_checkpoint_loads_strictly_into_the_vanilla_detector_and_predicts_the_same(voc, tmp_path):
    """With PS-KD beside; inference does not call the self-teacher."""
    runner = train(config(voc, tmp_path, PSKD, **FRSKD))
    dropped = publish_checkpoint(str(tmp_path / 'epoch_2.pth'), str(tmp_path / 'published.pth'))
    assert dropped == len(runner.model.roi_head.self_teacher.state_dict())
    plain = config(voc, tmp_path / 'plain').model
    vanilla = MODELS.build(plain).eval()
    load_checkpoint(vanilla, str(tmp_path / 'published.pth'), strict=True)
    runner.model.eval()
    batch = next(iter(runner.val_dataloader))
    runner.model.roi_head.self_teacher = None
    with torch.no_grad():
        ours, theirs = runner.model.test_step(batch)[0], vanilla.test_step(batch)[0]
    assert_same_state(dict(ours.pred_instances.items()), dict(theirs.pred_instances.items()))
    assert set(strip_self_teacher(runner.model.state_dict())) == set(vanilla.state_dict())


def test_bfloat16(voc, tmp_path, monkeypatch):
    """With all three methods the losses under autocast are near those in float32."""

    class Losses(Hook):
        def before_train(self, runner):
            self.steps = []

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            self.steps.append({k: v.item() for k, v in outputs.items() if 'loss' in k or 'pskd' in k})

    hooks = Losses(), Losses()
    for hook, amp in zip(hooks, (False, True)):
        cfg = config(voc, tmp_path / str(amp), PSKD, CSKD, **FRSKD)
        if amp:
            bfloat16(monkeypatch, cfg)
        train(cfg, hook)
    for plain, amp in zip(*(hook.steps for hook in hooks)):
        assert amp == pytest.approx(plain, rel=0.1, abs=2e-2)
    assert plain['pskd_soft'] > 0.1


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        ('c4', {}, 'regions are read from 1 level'),
        ('faster-rcnn', {'model.roi_head.bbox_head.loss_cls.use_sigmoid': True}, 'FRSKDRoIHead: .*use_sigmoid=False'),
        ('faster-rcnn', {'model.roi_head.alpha': -1}, 'alpha and beta must be at least 0'),
    ],
)
def test_what_cannot_work_is_refused(voc, tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(config(voc, tmp_path, model=model, **FRSKD, **options).model)
    assert issubclass(FRSKDRoIHead, MODELS.get('StandardRoIHead'))
