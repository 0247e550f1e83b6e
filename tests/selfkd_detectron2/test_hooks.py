"""PS-KD and CS-KD of regions and anchors in real training runs of Detectron2."""

import copy
import functools
import logging
import shutil

import helpers.detectron2 as d2_runs
import pytest
import torch
import torch.nn.functional as F
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor, HookBase
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import ImageList, Instances, RotatedBoxes
from helpers.detectron2 import CSKD, DROPOUT, FRSKD, PSKD, Reseed, batches, config, load, scalars, train
from helpers.processes import in_processes

from selfkd.pairing import same_class_partners
from selfkd.seeds import step_generator
from selfkd_detectron2 import CSKDHook, PSKDHook, with_self_teacher

assert_same_state = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


class Spy(HookBase):
    """Keeps what the detector's own methods compute its classification losses from, and the losses trained on."""

    def __init__(self):
        self.calls, self.losses = [], []

    def before_train(self):
        model = self.trainer.model
        heads = getattr(model, 'roi_heads', None)
        predictor = getattr(heads, 'box_predictor', model)
        for module in predictor if isinstance(predictor, torch.nn.ModuleList) else [predictor]:
            module.losses = self.spied(module.losses)

    def spied(self, method):
        def losses(*args):
            self.calls.append((self.trainer.iter, copy.deepcopy([_detached(a) for a in args])))
            return method(*args)

        return losses

    def after_step(self):
        self.losses.append({name: value for name, (value, _) in self.trainer.storage.latest().items()})


def _detached(value):
    if isinstance(value, torch.Tensor):
        return value.detach()
    return type(value)(_detached(v) for v in value) if isinstance(value, (list, tuple)) else value


def region_logits(heads, features, proposals, stage):
    boxes = [p.proposal_boxes for p in proposals]
    if hasattr(heads, 'res5'):
        return heads.box_predictor(heads._shared_roi_transform([features['res4']], boxes).mean((2, 3)))[0]
    features = [features[f] for f in heads.box_in_features]
    if hasattr(heads, 'num_cascade_stages'):
        return heads._run_stage(features, proposals, stage)[0]
    return heads.box_predictor(heads.box_head(heads.box_pooler(features, boxes)))[0]


BESIDE = {'faster, FRSKD': FRSKD, 'cascade, FRSKD': FRSKD}
EMA = {'faster, ema': 'SELFKD.PSKD.TEACHER ema SELFKD.PSKD.EMA_DECAY 0.9'}
EVAL = 'SELFKD.PSKD.TEACHER_MODE eval '


@pytest.mark.parametrize(
    'case',
    [
        'faster',
        'faster, hard background',
        'faster, shared weight',
        'faster, eval',
        'mask',
        'panoptic',
        'cascade',
        'cascade, eval',
        'c4',
        *BESIDE,
    ],
)
def test_region_loss_recomputed_from_the_checkpoint_at_the_start_of_the_period(voc, tmp_path, case):
    model, hard = case.split(',')[0], 'hard' in case
    options = f'{PSKD} {BESIDE.get(case, "")} SELFKD.PSKD.BACKGROUND {not hard} MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16'
    keep = 'shared' not in case
    options += f' {EVAL if "eval" in case else ""} SELFKD.PSKD.KEEP_HARD {keep}'
    cfg = config(voc, tmp_path, model, options)
    train(cfg, spy := Spy())
    teacher = load(cfg, tmp_path / 'model_0000002.pth').train('eval' not in case)
    stages = 3 if model == 'cascade' else 1
    assert [step for step, _ in spy.calls] == [step for step in range(6) for _ in range(stages)]
    objects = 0
    for i, (step, ((logits, _), proposals)) in enumerate(spy.calls):
        label = torch.cat([p.gt_classes for p in proposals])
        objects += (label < 10).sum()
        target, alpha = F.one_hot(label, 11).double(), 0.0
        if step >= 3:
            alpha = 0.8 * 3 / 6
            with torch.no_grad():
                images = teacher.preprocess_image(batches(cfg)[step % 2])
                features = teacher.backbone(images.tensor)
                past = region_logits(teacher.roi_heads, features, proposals, i % stages).double().softmax(1)
            if hard:
                past[label == 10] = F.one_hot(torch.tensor(10), 11).double()
            target = target * (1 if keep else 1 - alpha) + alpha * past
        expected = -(target * logits.double().log_softmax(1)).sum(1).mean().item()
        losses, suffix = spy.losses[step], f'_stage{i % stages}' if stages > 1 else ''
        scope = f'stage{i % stages}/' if stages > 1 else ''
        assert losses[f'loss_cls{suffix}'] == pytest.approx(expected, rel=1e-4)
        assert losses['pskd_alpha'] == pytest.approx(alpha)
        assert losses[f'{scope}pskd_hard'] + losses[f'{scope}pskd_soft'] == pytest.approx(expected, rel=1e-4)
    assert objects > 12  # there were digits among the regions
    assert ('loss_mask' in spy.losses[0]) == (model in ('mask', 'panoptic'))


@pytest.mark.parametrize('case', ['retinanet', 'retinanet, autocast', 'fcos'])
def test_dense_loss_recomputed_in_the_quality_focal_form(voc, tmp_path, case):
    """Mixed precision: as a CPU can, which has it for one-stage detectors only, and forwards only.

    Nothing is learnt there, so in training mode the past copy says what the student says: it is in evaluation mode.
    """
    model, autocast = case.split(',')[0], 'autocast' in case
    cfg = config(voc, tmp_path, model, PSKD + (EVAL if autocast else ''))
    train(cfg, spy := Spy(), model=model, kind=d2_runs.AutocastTrainer if autocast else d2_runs.Trainer)
    assert spy.calls[0][1][1][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    teacher = load(cfg, tmp_path / 'model_0000002.pth', model).train(not autocast)
    normalizer, ignored = {'retinanet': 100, 'fcos': 300}[model], 0
    for step, (_, logits, label, *_) in spy.calls:
        logits, label = torch.cat(logits, 1).double(), torch.stack(label)
        ignored += (label < 0).sum()
        normalizer = 0.9 * normalizer + 0.1 * max(((label >= 0) & (label < 10)).sum().item(), 1)
        hard = F.one_hot(label.clamp(min=0), 11)[..., :10].double()
        p = logits.sigmoid()
        cross_entropy = F.binary_cross_entropy(p, hard, reduction='none')
        focal = torch.where(hard == 1, 0.25 * (1 - p) ** 2, 0.75 * p**2) * cross_entropy
        alpha = 0.8 * 3 / 6 if step >= 3 else 0.0
        each, soft = focal, 0.0
        if alpha:
            with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                images = teacher.preprocess_image(batches(cfg)[step % 2])
                features = teacher.backbone(images.tensor)
                maps = teacher.head([features[f] for f in teacher.head_in_features])[0]
            anchors = 1 if model == 'fcos' else 3
            past = [m.unflatten(1, (anchors, 10)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
            past = torch.cat(past, 1).double().sigmoid()
            soft = alpha * (past - p) ** 2 * F.binary_cross_entropy(p, past, reduction='none')
            each, soft = each + soft, soft[label >= 0].sum().item() / normalizer
        name = {'retinanet': 'loss_cls', 'fcos': 'loss_fcos_cls'}[model]
        expected = each[label >= 0].sum().item() / normalizer
        assert spy.losses[step][name] == pytest.approx(expected, rel=1e-4)
        assert spy.losses[step]['pskd_soft'] == pytest.approx(soft, rel=1e-3)
    assert spy.losses[-1]['pskd_soft'] > 0
    assert (ignored > 0) == (model == 'retinanet')


class TwoClasses(d2_runs.Trainer):
    """Every image has objects of the same classes as another, and several of one."""

    @classmethod
    def build_train_loader(cls, cfg):
        loader = super().build_train_loader(cfg)
        for sample in sum(loader.items, []):
            sample['instances'].gt_classes %= 2
        return loader

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        for name, weight in model.named_parameters():
            if 'cls_score.weight' in name:  # far apart: a KL of 1e-4 is near float32's rounding
                weight.data.mul_(30)
        return model


@pytest.mark.parametrize('case', ['faster', 'mask', 'cascade', 'c4', *BESIDE])
def test_cskd_recomputed_pair_by_pair(voc, tmp_path, case):
    model = case.split(',')[0]
    options = f'{CSKD} {BESIDE.get(case, "")} SELFKD.CSKD.WEIGHT 0.5 SELFKD.CSKD.TEMPERATURE 2.0 SOLVER.MAX_ITER 2'
    cfg = config(voc, tmp_path, model, options)
    train(cfg, spy := Spy(), kind=TwoClasses)
    stages, kinds = 3 if model == 'cascade' else 1, set()
    for i, (step, ((logits, _), proposals)) in enumerate(spy.calls):
        label, expected = torch.cat([p.gt_classes for p in proposals]), 0.0
        image = torch.cat([p.gt_classes * 0 + k for k, p in enumerate(proposals)])
        truth = [sample['instances'].gt_boxes.tensor for sample in batches(cfg)[step]]
        thing = torch.cat([(p.gt_boxes.tensor[:, None] == t).all(2).int().argmax(1) for p, t in zip(proposals, truth)])
        draw = step_generator(step, i % stages)
        for anchor, partner in enumerate(same_class_partners(label, thing, image, ignore=10, generator=draw)):
            teacher, student = (logits[j].double().div(2).softmax(0) for j in (partner, anchor))
            expected += 0.5 * 2**2 * (teacher * (teacher / student).log()).sum().item() / len(label)
            kinds.add('other image' if image[anchor] != image[partner] else 'same image')
        suffix = f'_stage{i % stages}' if stages > 1 else ''
        assert expected > 0.005
        assert spy.losses[step][f'loss_cskd{suffix}'] == pytest.approx(expected, rel=1e-3)
        plain = F.cross_entropy(logits, label).item()
        assert spy.losses[step][f'loss_cls{suffix}'] == pytest.approx(plain, rel=1e-5)
    assert 'other image' in kinds


@pytest.mark.parametrize(
    ('model', 'options'),
    [
        ('faster', PSKD + 'SELFKD.PSKD.ALPHA 1e-30 ' + DROPOUT),
        ('cascade', PSKD + 'SELFKD.PSKD.ALPHA 1e-30 ' + CSKD + 'SELFKD.CSKD.WEIGHT 0'),
        ('retinanet', PSKD + 'SELFKD.PSKD.ALPHA 1e-30'),
    ],
)
def test_with_next_to_no_weight_it_trains_to_the_vanilla_weights(voc, tmp_path, model, options):
    """The teacher runs: it uses up no random number, and touches no statistic of the student."""
    sampled = 'MODEL.RPN.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 '
    sampled += DROPOUT if DROPOUT in options else ''
    vanilla = train(config(voc, tmp_path / 'vanilla', model, sampled)).model.state_dict()
    ours = train(config(voc, tmp_path / 'ours', model, sampled + options)).model.state_dict()
    assert_same_state(ours, vanilla)


@pytest.mark.parametrize('case', ['faster', 'panoptic', 'cascade', 'c4', 'retinanet', 'fcos', *BESIDE])
def test_checkpoint_is_the_vanilla_detectors_and_predicts_the_same(voc, tmp_path, case):
    """Through Detectron2's own DefaultPredictor, from the config without self-distillation."""
    model = case.split(',')[0]
    shown = ' MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.RETINANET.SCORE_THRESH_TEST 0.0 SOLVER.MAX_ITER 4'
    options = f'{PSKD} {"" if model in ("retinanet", "fcos") else CSKD} {BESIDE.get(case, "")} {shown}'
    trainer = train(config(voc, tmp_path, model, options), model=model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())
    plain = config(voc, tmp_path, model, shown)
    plain.MODEL.WEIGHTS = str(tmp_path / 'model_final.pth')
    if model == 'fcos':  # which no YAML config builds
        predictor, vanilla = None, load(plain, plain.MODEL.WEIGHTS, model)
        trainer.model.test_score_thresh = vanilla.test_score_thresh = 0.0
    else:
        predictor = DefaultPredictor(plain)
        vanilla = predictor.model
    assert vanilla.state_dict().keys() == {n for n in trainer.model.state_dict() if 'self_teacher' not in n.split('.')}
    trainer.model.eval()
    for sample in batches(plain)[0]:
        sample = dict(sample, height=100, width=90)
        if predictor is None:
            with torch.no_grad():
                theirs = vanilla([sample])[0]['instances']
        else:
            image = read_image(sample['file_name'], 'BGR')
            theirs = predictor(image)['instances']
            sample = dict(sample, height=image.shape[0], width=image.shape[1])
            resized = predictor.aug.get_transform(image).apply_image(image)
            sample['image'] = torch.as_tensor(resized.astype('float32').transpose(2, 0, 1))
        with torch.no_grad():
            ours = trainer.model([sample])[0]['instances']
        assert len(ours) > 0
        assert_same_state(*({k: getattr(v, 'tensor', v) for k, v in x.get_fields().items()} for x in (ours, theirs)))


@pytest.mark.parametrize('frskd', ['', FRSKD])
def test_past_copy_costs_the_vanilla_weights_alone(voc, tmp_path, frskd):
    trainer = train(config(voc, tmp_path, options=PSKD + frskd))
    past = next(hook for hook in trainer._hooks if isinstance(hook, PSKDHook)).past.model
    assert all(p.grad is None for p in past.parameters())
    ours = {id(p) for p in past.parameters()}
    assert not ours & {id(p) for group in trainer.optimizer.param_groups for p in group['params']}
    vanilla = build_model(config(voc, tmp_path))
    assert past.state_dict().keys() == vanilla.state_dict().keys()
    vanilla = build_model(with_self_teacher(trainer.cfg))
    assert trainer.model.state_dict().keys() == vanilla.state_dict().keys()
    assert len(trainer.optimizer.state) == len(list(vanilla.parameters()))


@pytest.fixture(scope='module', params=['faster', 'faster, ema', 'cascade, FRSKD'])
def straight(request, voc, tmp_path_factory):
    """A run with checkpoints: the name of the detector, the options, and the folder."""
    case, folder = request.param, tmp_path_factory.mktemp('straight')
    options = (
        f'{PSKD} {CSKD} {DROPOUT} {BESIDE.get(case, EMA.get(case, ""))} SOLVER.MAX_ITER 8 SOLVER.CHECKPOINT_PERIOD 2'
    )
    model = case.split(',')[0]
    train(config(voc, folder, model, options), Reseed())
    return model, options, folder


@pytest.mark.parametrize('start', [2, 4, 6])  # before the first period ends, between two refreshes, and at one
def test_resume_is_exact(voc, tmp_path, start, straight):
    """Given the same batches and seeds: Detectron2 itself restores neither. The past copy's noise is its own."""
    model, options, folder = straight
    cfg = config(voc, tmp_path, model, options)
    saved = f'model_{start - 1:07d}.pth'
    shutil.copy(folder / saved, tmp_path)
    (tmp_path / 'last_checkpoint').write_text(saved)
    assert ('PSKDHook' in torch.load(folder / saved)['trainer']['hooks']) == (start == 4 or 'TEACHER ema' in options)
    train(cfg, Reseed(), resume=True)
    straight, resumed = (torch.load(run / 'model_final.pth') for run in (folder, tmp_path))
    for key in ('model', 'iteration'):
        assert_same_state(resumed[key], straight[key])
    assert_same_state(resumed['trainer']['_trainer']['optimizer'], straight['trainer']['_trainer']['optimizer'])


def test_resumed_without_a_past_copy_it_is_plain_until_the_next_period(voc, tmp_path, caplog):
    """PS-KD switched on at --resume, between two refreshes: alpha is above 0, and there is no past."""
    options = 'SOLVER.CHECKPOINT_PERIOD 5 SOLVER.MAX_ITER 8 '
    train(config(voc, tmp_path, options=options), Reseed())
    (tmp_path / 'last_checkpoint').write_text('model_0000004.pth')
    logging.getLogger('detectron2.selfkd').addHandler(caplog.handler)
    cfg = config(voc, tmp_path, options=options + PSKD)
    train(cfg, spy := Spy(), Reseed(), resume=True)
    assert 'training resumes without a past copy' in caplog.text
    assert 'it is plain until iteration 6' in caplog.text
    assert [step for step, _ in spy.calls] == [5, 6, 7]
    (_, ((logits, _), proposals)), losses = spy.calls[0], spy.losses[0]
    plain = F.cross_entropy(logits, torch.cat([p.gt_classes for p in proposals])).item()
    assert losses['loss_cls'] == pytest.approx(plain, rel=1e-5)
    assert [step['pskd_soft'] > 0 for step in spy.losses] == [False, True, True]


def test_the_moving_average(voc, tmp_path):
    """Of the weights after each iteration, with a decay that grows to the one asked for; it learns no statistics."""
    weights, averages = [], []

    class Watch(HookBase):
        def after_step(self):
            hook = next(hook for hook in self.trainer._hooks if isinstance(hook, PSKDHook))
            for kept, model in ((weights, self.trainer.model), (averages, hook.past.model)):
                kept.append([p.detach().clone() for p in model.parameters()])

        def before_train(self):
            self.initial = [p.detach().clone() for p in self.trainer.model.parameters()]

    options = f'{PSKD} SELFKD.PSKD.TEACHER ema SELFKD.PSKD.EMA_DECAY 0.3'
    train(config(voc, tmp_path, options=options), watch := Watch())
    expected = watch.initial
    for step, (now, average) in enumerate(zip(weights, averages), 1):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, now)]
        torch.testing.assert_close(average, expected)


def test_the_log_says_what_auto_takes_and_what_does_nothing(voc, tmp_path, caplog):
    logging.getLogger('detectron2.selfkd').addHandler(caplog.handler)
    train(config(voc, tmp_path, options=PSKD + 'SELFKD.PSKD.EMA_DECAY 0.9'))
    assert "teacher='snapshot', a past copy of the detector, as regions and anchors are others" in caplog.text
    assert "ema_decay: no effect with teacher='snapshot', which was taken" in caplog.text


def test_resuming_with_another_teacher_is_refused(voc, tmp_path):
    options = 'SOLVER.CHECKPOINT_PERIOD 5 SOLVER.MAX_ITER 8 ' + PSKD
    train(config(voc, tmp_path, options=options))
    (tmp_path / 'last_checkpoint').write_text('model_0000004.pth')
    with pytest.raises(ValueError, match="of teacher='snapshot', and this run's of teacher='ema'"):
        train(config(voc, tmp_path, options=options + EMA['faster, ema']), resume=True)


def test_two_processes_train_one_detector(voc, tmp_path):
    methods = {
        'hooks': PSKD + CSKD,
        'frskd': FRSKD,
        'cascade': f'{d2_runs.MODELS["cascade"]} {FRSKD} {PSKD} {CSKD}',
    }
    in_processes(tmp_path, functools.partial(d2_runs.two_processes, voc, tmp_path, methods), 2)
    for name in methods:
        first, second = (torch.load(tmp_path / f'{name}{rank}.pth') for rank in range(2))
        assert_same_state(first['teacher'], second['teacher'])  # both have rank 0's batch-norm statistics
        differ = {n for n, value in first['model'].items() if not torch.equal(value, second['model'][n])}
        assert 'backbone.bottom_up.stem.conv1.norm.running_mean' in differ
        assert all('running' in n for n in differ)
    # The batch size of a config is that of all processes together: a pass has as many iterations as with one.
    assert [torch.load(tmp_path / f'period{rank}.pth') for rank in range(2)] == [2, 2]


def test_default_interval_is_a_pass_over_the_training_set(voc, tmp_path):
    cfg = config(voc, tmp_path, options='SELFKD.PSKD.ENABLED True SOLVER.MAX_ITER 5')
    trainer = d2_runs.script.Trainer(cfg)
    trainer.train()
    assert next(hook for hook in trainer._hooks if isinstance(hook, PSKDHook)).period == 2  # 4 images, batches of 2
    assert d2_runs.default_period(cfg) == 2
    assert scalars(tmp_path)[4]['pskd_alpha'] == pytest.approx(0.8 * 4 / 5)


@ROI_HEADS_REGISTRY.register()
class ContextROIHeads(StandardROIHeads):
    """Adds what the whole image shows to the regions' features."""

    def _forward_box(self, features, proposals):
        return super()._forward_box({name: maps + maps.mean() for name, maps in features.items()}, proposals)


@ROI_HEADS_REGISTRY.register()
class OwnPoolerROIHeads(StandardROIHeads):
    """Never calls the pooler that tells which regions are classified."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own_pooler = copy.deepcopy(self.box_pooler)

    def _forward_box(self, features, proposals):
        pooler, self.box_pooler = self.box_pooler, self.own_pooler
        losses = super()._forward_box(features, proposals)
        self.box_pooler = pooler
        return losses


class OwnLossPredictor(FastRCNNOutputLayers):
    def losses(self, predictions, proposals):
        losses = super().losses(predictions, proposals)
        return {**losses, 'loss_cls': losses['loss_cls'] ** 2}


@ROI_HEADS_REGISTRY.register()
class OwnLossROIHeads(StandardROIHeads):
    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        parts = super()._init_box_head(cfg, input_shape)
        return {**parts, 'box_predictor': OwnLossPredictor(cfg, parts['box_head'].output_shape)}


@BACKBONE_REGISTRY.register()
class BranchedBackbone(Backbone):
    """As TridentNet's in training: the features of two branches, one below the other, each of all images."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.net = build_resnet_fpn_backbone(cfg, input_shape)
        self.output_shape = self.net.output_shape

    @property
    def size_divisibility(self):
        return self.net.size_divisibility

    def forward(self, images):
        return self.net(torch.cat([images, images.flip(3)]) if self.training else images)


@PROPOSAL_GENERATOR_REGISTRY.register()
class BranchedRPN(RPN):
    def forward(self, images, features, gt_instances=None):
        images = ImageList(torch.cat([images.tensor] * 2), images.image_sizes * 2)
        return super().forward(images, features, gt_instances * 2)


@ROI_HEADS_REGISTRY.register()
class BranchedROIHeads(StandardROIHeads):
    def forward(self, images, features, proposals, targets=None):
        return super().forward(images, features, proposals, targets * 2)


OWN_LOSS = 'MODEL.ROI_HEADS.NAME OwnLossROIHeads'
BRANCHES = 'MODEL.BACKBONE.NAME BranchedBackbone MODEL.ROI_HEADS.NAME BranchedROIHeads '
BRANCHES += 'MODEL.PROPOSAL_GENERATOR.NAME BranchedRPN'
ROTATED = """MODEL.ROI_HEADS.NAME RROIHeads MODEL.PROPOSAL_GENERATOR.NAME RRPN
    MODEL.ANCHOR_GENERATOR.NAME RotatedAnchorGenerator MODEL.ANCHOR_GENERATOR.ANGLES [[-90,0,90]]
    MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlignRotated MODEL.RPN.BBOX_REG_WEIGHTS (1.0,1.0,1.0,1.0,1.0)
    MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS (10.0,10.0,5.0,5.0,1.0)"""


class RotatedTrainer(d2_runs.Trainer):
    """The digits' boxes as rotated ones, of angle 0."""

    @classmethod
    def build_train_loader(cls, cfg):
        found = batches(cfg)
        for sample in (sample for batch in found for sample in batch):
            objects = sample['instances']
            boxes = objects.gt_boxes.tensor
            centers, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
            sample['instances'] = Instances(
                objects.image_size,
                gt_boxes=RotatedBoxes(torch.cat([centers, sizes, torch.zeros(len(boxes), 1)], dim=1)),
                gt_classes=objects.gt_classes,
            )
        return d2_runs.Cycle(found)


@pytest.mark.parametrize(('options', 'kind'), [(BRANCHES, d2_runs.Trainer), (ROTATED, RotatedTrainer)])
def test_derived_heads_are_taught_as_those_that_they_derive_from(voc, tmp_path, options, kind):
    """The past's term is added to the label's, and class-wise pairs are found by the labels of the own matching."""
    cfg = config(voc, tmp_path, options=f'{PSKD} {CSKD} {options} MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16')
    train(cfg, spy := Spy(), kind=kind)
    for (step, ((logits, _), proposals)), losses in zip(spy.calls, spy.losses):
        hard = F.cross_entropy(logits, torch.cat([p.gt_classes for p in proposals])).item()
        assert losses['pskd_hard'] == pytest.approx(hard, rel=1e-4)
        assert (losses['pskd_soft'] > 0) == (step >= 3)
        assert losses['loss_cls'] == pytest.approx(losses['pskd_hard'] + losses['pskd_soft'], rel=1e-4)
    assert any(losses['loss_cskd'] > 0 for losses in spy.losses)
    assert all(len(logits) == (64 if kind is d2_runs.Trainer else 32) for _, ((logits, _), _) in spy.calls)


SIGMOID = 'MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True'


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        ('faster', PSKD + 'SELFKD.PSKD.ALPHA 1.5', r'\(SELFKD.PSKD\): alpha must lie in \[0, 1\], got 1.5'),
        ('faster', PSKD + 'SELFKD.PSKD.INTERVAL 0', 'SELFKD.PSKD.* interval must be a positive number of steps, got 0'),
        (
            'faster',
            'SELFKD.PSKD.ENABLED True SELFKD.PSKD.INTERVAL 2.5',
            'SELFKD.PSKD.* interval must be a positive number of steps, got 2.5',
        ),
        (
            'faster',
            PSKD + 'SELFKD.PSKD.INTERVAL 6',
            r'the first 6 iterations \(interval \(SELFKD.PSKD.INTERVAL\)\) have no past, and training ends after 6',
        ),
        ('faster', PSKD + 'SELFKD.PSKD.TEACHER bank', "teacher='bank' keeps a prediction .* set 'snapshot' or 'ema'"),
        ('faster', PSKD + 'SELFKD.PSKD.TEACHER past', 'teacher must be one of'),
        ('faster', PSKD + 'SELFKD.PSKD.TEACHER ema SELFKD.PSKD.EMA_DECAY 1.0', r'ema_decay must lie in \[0, 1\)'),
        (
            'faster',
            PSKD + 'SELFKD.PSKD.TEACHER snapshot SELFKD.PSKD.EMA_DECAY 0.9',
            "with teacher='snapshot' ema_decay would do nothing: remove",
        ),
        (
            'faster',
            PSKD + 'SELFKD.PSKD.TEACHER_MODE test',
            r"teacher_mode must be one of \['train', 'eval'\], got 'test'",
        ),
        ('faster', PSKD + 'SELFKD.PSKD.INTERVAL None', 'Cycle how many iterations .*SELFKD.PSKD.INTERVAL'),
        ('faster', CSKD + 'SELFKD.CSKD.WEIGHT -1', r'\(SELFKD.CSKD\): weight must be at least 0'),
        ('faster', CSKD + 'SELFKD.CSKD.WEIGHT 1e999', r'\(SELFKD.CSKD\): weight must be finite, got inf'),
        ('faster', CSKD + 'SELFKD.CSKD.TEMPERATURE 0', r'\(SELFKD.CSKD\): temperature must be above 0'),
        ('faster', PSKD + 'MODEL.ROI_HEADS.NUM_CLASSES 20', 'ROI_HEADS.NUM_CLASSES is 20, .* has 10 classes'),
        ('retinanet', PSKD + 'MODEL.RETINANET.NUM_CLASSES 20', 'RETINANET.NUM_CLASSES is 20, .* has 10 classes'),
        ('faster', PSKD + SIGMOID, 'FastRCNNOutputLayers with use_sigmoid_ce .* is not supported'),
        ('faster', CSKD + SIGMOID, 'FastRCNNOutputLayers with use_sigmoid_ce .* is not supported'),
        ('retinanet', CSKD, 'CSKDHook: RetinaNet is not supported'),
        ('retinanet', PSKD + 'SELFKD.PSKD.BACKGROUND False', 'background=False .* and RetinaNet has none'),
        ('retinanet', PSKD + 'SELFKD.PSKD.KEEP_HARD False', 'keep_hard=False .* and RetinaNet has none'),
        ('retinanet', PSKD + 'MODEL.RETINANET.FOCAL_LOSS_GAMMA 0.5', 'focal_loss_gamma must be 0 or at least 1'),
        ('faster', PSKD + 'MODEL.META_ARCHITECTURE ProposalNetwork', 'ProposalNetwork is not supported'),
        (
            'faster',  # DeepLab's; it has another number of classes than ROI heads, which it has not
            PSKD + 'MODEL.META_ARCHITECTURE SemanticSegmentor MODEL.ROI_HEADS.NUM_CLASSES 80',
            'SemanticSegmentor is not supported',
        ),
        (
            'faster',
            PSKD + 'MODEL.ROI_HEADS.NAME ContextROIHeads',
            'ContextROIHeads in GeneralizedRCNN does not classify regions by its box pooler, head and predictor',
        ),
        ('faster', CSKD + 'MODEL.ROI_HEADS.NAME OwnPoolerROIHeads', 'OwnPoolerROIHeads in GeneralizedRCNN does not'),
        ('faster', PSKD + OWN_LOSS, 'but OwnLossROIHeads with OwnLossPredictor gives .* as loss_cls: .*another loss'),
        ('faster', CSKD + OWN_LOSS, 'but OwnLossROIHeads with OwnLossPredictor gives .* as loss_cls: .*another loss'),
        (
            'faster',
            f'{PSKD} {EVAL} {BRANCHES}',
            "BranchedBackbone gives other features than in training .* set teacher_mode='train'",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(voc, tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        train(config(voc, tmp_path, model, options))


def test_run_shorter_than_a_pass_over_the_data_is_refused(voc, tmp_path):
    cfg = config(voc, tmp_path, options='SELFKD.PSKD.ENABLED True SOLVER.MAX_ITER 2')
    with pytest.raises(
        ValueError, match=r'the first 2 iterations \(a pass over the training set\) .* ends after 2.*INTERVAL'
    ):
        d2_runs.script.Trainer(cfg).train()


@pytest.mark.parametrize(('options', 'hook'), [(PSKD, PSKDHook(interval=3)), (CSKD, CSKDHook())])
def test_one_method_twice_is_refused(voc, tmp_path, options, hook):
    with pytest.raises(ValueError, match=f'{type(hook).__name__} is registered twice'):
        train(config(voc, tmp_path, options=options), hook)


def test_a_tap_that_never_fires_is_an_error(voc, tmp_path):
    class OtherModel(d2_runs.Trainer):
        def run_step(self):
            build_model(self.cfg)(next(self._trainer._data_loader_iter))

    with pytest.raises(RuntimeError, match='PSKDHook: the detector computed no classification loss'):
        OtherModel(config(voc, tmp_path, options=PSKD)).train()
