"""PS-KD and CS-KD of regions and anchors in real training runs of Detectron2."""

import copy
import functools
import shutil

import d2_runs
import pytest
import torch
import torch.nn.functional as F
from d2_runs import CSKD, FRSKD, FRSKD_CASCADE, PSKD, Reseed, batches, config, load, scalars, train
from detectron2.engine import HookBase, launch
from detectron2.modeling import build_model

from selfkd_detectron2 import PSKDHook

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


BESIDE = {'faster, FRSKD': FRSKD, 'cascade, FRSKD': FRSKD_CASCADE}


@pytest.mark.parametrize('case', ['faster', 'faster, hard background', 'mask', 'cascade', 'c4', *BESIDE])
def test_region_loss_recomputed_from_the_checkpoint_at_the_start_of_the_period(voc, tmp_path, case):
    model, hard = case.split(',')[0], 'hard' in case
    options = f'{PSKD} {BESIDE.get(case, "")} SELFKD.PSKD.BACKGROUND {not hard} MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16'
    cfg = config(voc, tmp_path, model, options)
    train(cfg, spy := Spy())
    teacher = load(cfg, tmp_path / 'model_0000002.pth')
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
            target = (1 - alpha) * target + alpha * past
        expected = -(target * logits.double().log_softmax(1)).sum(1).mean().item()
        losses, suffix = spy.losses[step], f'_stage{i % stages}' if stages > 1 else ''
        scope = f'stage{i % stages}/' if stages > 1 else ''
        assert losses[f'loss_cls{suffix}'] == pytest.approx(expected, rel=1e-4)
        assert losses['pskd_alpha'] == pytest.approx(alpha)
        assert losses[f'{scope}pskd_hard'] + losses[f'{scope}pskd_soft'] == pytest.approx(expected, rel=1e-4)
    assert objects > 12  # there were digits among the regions
    assert ('loss_mask' in spy.losses[0]) == (model == 'mask')


@pytest.mark.parametrize('case', ['retinanet', 'retinanet, autocast', 'fcos'])
def test_dense_loss_recomputed_in_the_quality_focal_form(voc, tmp_path, case):
    """Mixed precision: as a CPU can, which has it for one-stage detectors only, and forwards only."""
    model, autocast = case.split(',')[0], 'autocast' in case
    cfg = config(voc, tmp_path, model, PSKD)
    train(cfg, spy := Spy(), model=model, kind=d2_runs.AutocastTrainer if autocast else d2_runs.Trainer)
    assert spy.calls[0][1][1][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    teacher = load(cfg, tmp_path / 'model_0000002.pth', model)
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


@pytest.mark.parametrize('case', ['faster', 'mask', 'cascade', 'c4', *BESIDE])
def test_cskd_recomputed_pair_by_pair(voc, tmp_path, case):
    model = case.split(',')[0]
    options = f'{CSKD} {BESIDE.get(case, "")} SELFKD.CSKD.WEIGHT 0.5 SELFKD.CSKD.TEMPERATURE 2.0 SOLVER.MAX_ITER 2'
    train(config(voc, tmp_path, model, options), spy := Spy())
    stages, compared = 3 if model == 'cascade' else 1, 0
    for i, (step, ((logits, _), proposals)) in enumerate(spy.calls):
        label, expected = torch.cat([p.gt_classes for p in proposals]), 0.0
        for cls in range(10):
            members = (label == cls).nonzero().flatten().tolist()
            for anchor, partner in zip(members, members[1:] + members[:1]):
                teacher, student = (logits[j].double().div(2).softmax(0) for j in (partner, anchor))
                expected += 0.5 * 2**2 * (teacher * (teacher / student).log()).sum().item() / len(label)
                compared += anchor != partner
        suffix = f'_stage{i % stages}' if stages > 1 else ''
        assert spy.losses[step][f'loss_cskd{suffix}'] == pytest.approx(expected, rel=1e-3, abs=1e-9)
        plain = F.cross_entropy(logits, label).item()
        assert spy.losses[step][f'loss_cls{suffix}'] == pytest.approx(plain, rel=1e-5)
    assert compared


@pytest.mark.parametrize(
    ('model', 'options'),
    [
        ('faster', PSKD + 'SELFKD.PSKD.ALPHA 0.0'),
        ('faster', PSKD + 'SELFKD.PSKD.ALPHA 1e-30'),
        ('cascade', PSKD + 'SELFKD.PSKD.ALPHA 1e-30 ' + CSKD + 'SELFKD.CSKD.WEIGHT 0.0'),
        ('retinanet', PSKD + 'SELFKD.PSKD.ALPHA 1e-30'),
    ],
)
def test_weight_0_trains_to_the_vanilla_weights(voc, tmp_path, model, options):
    """At 1e-30 the teacher runs: it uses up no random number, and touches no statistic of the student."""
    sampled = 'MODEL.RPN.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 '
    vanilla = train(config(voc, tmp_path / 'vanilla', model, sampled)).model.state_dict()
    ours = train(config(voc, tmp_path / 'ours', model, sampled + options)).model.state_dict()
    assert_same_state(ours, vanilla)


@pytest.mark.parametrize('model', ['faster', 'cascade', 'c4', 'retinanet', 'fcos'])
def test_checkpoint_is_the_vanilla_detectors_and_predicts_the_same(voc, tmp_path, model):
    options = f'{PSKD} {CSKD if model in ("faster", "cascade", "c4") else ""} SOLVER.MAX_ITER 4'
    options += ' MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.RETINANET.SCORE_THRESH_TEST 0.0'
    cfg = config(voc, tmp_path, model, options)
    trainer = train(cfg, model=model)
    vanilla = load(cfg, tmp_path / 'model_final.pth', model)
    if model == 'fcos':
        trainer.model.test_score_thresh = vanilla.test_score_thresh = 0.0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())
    trainer.model.eval()
    with torch.no_grad():
        ours, theirs = ([x['instances'] for x in m(batches(cfg)[0])] for m in (trainer.model, vanilla))
    assert sum(len(x) for x in ours) > 0
    for a, b in zip(ours, theirs):
        assert_same_state(
            {k: getattr(v, 'tensor', v) for k, v in a.get_fields().items()},
            {k: getattr(v, 'tensor', v) for k, v in b.get_fields().items()},
        )


@pytest.mark.parametrize('frskd', ['', FRSKD])
def test_past_copy_costs_the_vanilla_weights_alone(voc, tmp_path, frskd):
    trainer = train(config(voc, tmp_path, options=PSKD + frskd))
    past = next(hook for hook in trainer._hooks if isinstance(hook, PSKDHook)).teacher.model
    assert all(p.grad is None and not p.requires_grad for p in past.parameters())
    ours = {id(p) for p in past.parameters()}
    assert not ours & {id(p) for group in trainer.optimizer.param_groups for p in group['params']}
    vanilla = build_model(config(voc, tmp_path))
    assert past.state_dict().keys() == vanilla.state_dict().keys()
    vanilla = build_model(trainer.cfg)
    assert trainer.model.state_dict().keys() == vanilla.state_dict().keys()
    assert len(trainer.optimizer.state) == len(list(vanilla.parameters()))


@pytest.mark.parametrize('model', ['faster', 'cascade, FRSKD'])
@pytest.mark.parametrize('start', [4, 6])  # between two refreshes of the past copy, and at one
def test_resume_is_exact(voc, tmp_path, start, model):
    """Given the same batches and seeds: Detectron2 itself restores neither."""
    options = f'{PSKD} {CSKD} {BESIDE.get(model, "")} SOLVER.MAX_ITER 8 SOLVER.CHECKPOINT_PERIOD {start}'
    model = model.split(',')[0]
    train(config(voc, tmp_path / 'straight', model, options), Reseed())
    cfg = config(voc, tmp_path / 'resumed', model, options)
    saved = f'model_{start - 1:07d}.pth'
    (tmp_path / 'resumed').mkdir()
    shutil.copy(tmp_path / 'straight' / saved, tmp_path / 'resumed')
    (tmp_path / 'resumed/last_checkpoint').write_text(saved)
    assert ('PSKDHook' in torch.load(tmp_path / 'straight' / saved)['trainer']['hooks']) == (start == 4)
    train(cfg, Reseed(), resume=True)
    straight, resumed = (torch.load(tmp_path / run / 'model_final.pth') for run in ('straight', 'resumed'))
    for key in ('model', 'iteration'):
        assert_same_state(resumed[key], straight[key])
    assert_same_state(resumed['trainer']['_trainer']['optimizer'], straight['trainer']['_trainer']['optimizer'])


def test_two_processes_train_one_detector(voc, tmp_path):
    methods = {
        'hooks': PSKD + CSKD,
        'frskd': FRSKD,
        'cascade': f'{d2_runs.MODELS["cascade"]} {FRSKD_CASCADE} {PSKD} {CSKD}',
    }
    launch(d2_runs.two_processes, 2, dist_url='auto', args=(voc, tmp_path, methods))
    for name in methods:
        first, second = (torch.load(tmp_path / f'{name}{rank}.pth') for rank in range(2))
        assert_same_state(first['teacher'], second['teacher'])  # both have rank 0's batch-norm statistics
        differ = {n for n, value in first['model'].items() if not torch.equal(value, second['model'][n])}
        assert 'backbone.bottom_up.stem.conv1.norm.running_mean' in differ
        assert all('running' in n for n in differ)


def test_default_interval_is_a_pass_over_the_training_set(voc, tmp_path):
    cfg = config(voc, tmp_path, options='SELFKD.PSKD.ENABLED True SOLVER.MAX_ITER 5')
    trainer = d2_runs.train_detectron2.Trainer(cfg)
    trainer.train()
    assert next(hook for hook in trainer._hooks if isinstance(hook, PSKDHook)).period == 2  # 4 images, batches of 2
    assert scalars(tmp_path)[4]['pskd_alpha'] == pytest.approx(0.8 * 4 / 5)


SIGMOID = 'MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True'


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        ('faster', PSKD + 'SELFKD.PSKD.ALPHA 1.5', r'\(SELFKD.PSKD\): alpha must lie in \[0, 1\], got 1.5'),
        ('faster', PSKD + 'SELFKD.PSKD.INTERVAL 0', 'SELFKD.PSKD.INTERVAL.* positive number of iterations, got 0'),
        ('faster', PSKD + 'SELFKD.PSKD.INTERVAL None', 'Cycle how many iterations .*SELFKD.PSKD.INTERVAL'),
        ('faster', CSKD + 'SELFKD.CSKD.WEIGHT -1.0', r'\(SELFKD.CSKD\): weight must be at least 0'),
        ('faster', CSKD + 'SELFKD.CSKD.TEMPERATURE 0.0', r'\(SELFKD.CSKD\): temperature must be above 0'),
        ('faster', PSKD + 'MODEL.ROI_HEADS.NUM_CLASSES 20', 'ROI_HEADS.NUM_CLASSES is 20, .* has 10 classes'),
        ('retinanet', PSKD + 'MODEL.RETINANET.NUM_CLASSES 20', 'RETINANET.NUM_CLASSES is 20, .* has 10 classes'),
        ('faster', PSKD + SIGMOID, 'FastRCNNOutputLayers with use_sigmoid_ce .* is not supported'),
        ('faster', CSKD + SIGMOID, 'FastRCNNOutputLayers with use_sigmoid_ce .* is not supported'),
        ('retinanet', CSKD, 'CSKDHook: RetinaNet with the ROI heads NoneType is not supported'),
        ('retinanet', PSKD + 'SELFKD.PSKD.BACKGROUND False', 'RetinaNet has no background class'),
        ('retinanet', PSKD + 'MODEL.RETINANET.FOCAL_LOSS_GAMMA 0.5', 'focal_loss_gamma must be 0 or at least 1'),
        ('faster', PSKD + 'MODEL.META_ARCHITECTURE ProposalNetwork', 'ProposalNetwork with the ROI heads NoneType'),
        ('faster', PSKD + 'MODEL.META_ARCHITECTURE SemanticSegmentor', 'SemanticSegmentor with the ROI heads NoneType'),
        ('mask', PSKD + 'MODEL.META_ARCHITECTURE PanopticFPN', 'PanopticFPN with the ROI heads StandardROIHeads'),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(voc, tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        train(config(voc, tmp_path, model, options))


def test_a_tap_that_never_fires_is_an_error(voc, tmp_path):
    class OtherModel(d2_runs.Trainer):
        def run_step(self):
            build_model(self.cfg)(next(self._trainer._data_loader_iter))

    with pytest.raises(RuntimeError, match='PSKDHook: the detector computed no classification loss'):
        OtherModel(config(voc, tmp_path, options=PSKD)).train()
