"""PS-KD in real MMDetection training runs."""

import pytest
import torch
import torch.nn.functional as F
from helpers.mmdet import CSKD, FRSKD, MODIFY, PSKD, Regions, StopAfter, bfloat16, config
from helpers.mmengine import assert_same_state, by_iterations, find_hook, train, train_in_processes
from mmdet.registry import MODELS
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.runner import load_checkpoint

from selfkd_mmdet import CSKDHook, PSKDHook

BATCH_NORM = {'model.roi_head.bbox_head.norm_cfg': dict(type='BN', _delete_=True)}


def of_seesaw(logits, past, weight, avg_factor):
    """Objectness, and the classes as far as there is an object."""
    kl = [-(p.softmax(1) * z.log_softmax(1)).sum(1) for p, z in ((past[:, i], logits[:, i]) for i in SEESAW)]
    return ((kl[1] + past[:, -2:].softmax(1)[:, 0] * kl[0]) * weight).sum() / avg_factor


def of_sigmoids(gamma):
    def past_term(logits, past, weight, avg_factor):
        target, p = past.sigmoid(), logits.sigmoid()
        losses = (target - p).abs() ** gamma * F.binary_cross_entropy(p, target, reduction='none')
        return (losses.sum(1) * weight).sum() / avg_factor

    return past_term


SEESAW = (slice(0, 10), slice(10, 12))  # classes, objectness
PARTS = {  # of the losses that are no cross-entropy of a softmax: the past's term
    'seesaw': of_seesaw,
    'sigmoid': of_sigmoids(0),
    'sparse': lambda *args: 2.0 * of_sigmoids(2)(*args),
}


@pytest.mark.parametrize(
    'case',
    [
        'faster-rcnn',
        'evaluation mode',
        'hard background',
        'shared weight',
        'hard background, batch norm',
        'accumulation',
        'cascade',
        'cascade, FRSKD',
        'mask',
        'c4',
        'dynamic',
        'mask scoring',
        'point rend',
        'sabl',
        'double head',
        'pisa',
        'seesaw',
        'sigmoid',
        'sparse',
    ],
)
def test_loss_of_regions_recomputed_from_the_previous_epochs_checkpoint(voc, tmp_path, case):
    """Batch norms of the past copy's box head see all regions, also where the background's label stays hard."""
    case, *more = case.split(', ')
    model = case if case in MODIFY else 'faster-rcnn'
    options = {(): {}, ('FRSKD',): FRSKD, ('batch norm',): BATCH_NORM}[tuple(more)]
    mode, keep = 'eval' if case == 'evaluation mode' else 'train', case != 'shared weight'
    cfg = config(
        voc,
        tmp_path,
        dict(PSKD, background='hard' not in case, teacher_mode=mode, keep_hard=keep),
        model=model,
        **options,
    )
    if case == 'accumulation':
        cfg.optim_wrapper.accumulative_counts = 2
    train(cfg, regions := Regions())
    teacher = MODELS.build(cfg.model)
    load_checkpoint(teacher, str(tmp_path / 'epoch_1.pth'), strict=True)
    teacher.train(mode == 'train')
    stages = 2 if case in ('cascade', 'sparse') else 1
    for step in regions.steps:
        alpha = 0.8 * (step['epoch'] + 1) / 2
        assert len(step['calls']) == stages
        feats_of_regions = step['feats']
        for stage, (logits, label, weight, avg_factor) in enumerate(step['calls']):
            target, past = F.one_hot(label, 11).double(), None
            if step['epoch'] > 0:
                with torch.no_grad():
                    feats = teacher.extract_feat(step['inputs'])
                    arguments = (stage, feats) if stages > 1 else (feats,)
                    more = (feats_of_regions, step['metas']) if case == 'sparse' else ()
                    found = teacher.roi_head._bbox_forward(*arguments, step['rois'][stage], *more)
                    past, feats_of_regions = found['cls_score'], found.get('object_feats')
            name, factor = (f's{stage}.loss_cls', [1, 0.5][stage]) if stages > 1 else ('loss_cls', 1)
            if case in PARTS:
                expected = step['plain'][stage] + (0 if past is None else alpha) * PARTS[case](
                    logits.double(), (logits if past is None else past.flatten(0, -2)).double(), weight, avg_factor
                )
            else:
                if past is not None:
                    past = past.softmax(1)
                    if 'hard' in case:
                        past[label == 10] = F.one_hot(torch.tensor(10), 11).float()
                    target = target * (1 if keep else 1 - alpha) + alpha * past
                expected = -((target * logits.double().log_softmax(1)).sum(1) * weight).sum() / avg_factor
            total = sum(value for key, value in step['outputs'].items() if key.startswith(name))
            assert total == pytest.approx(factor * float(expected), rel=1e-4)
    keys = {'s0.pskd_hard', 's1.pskd_soft'} if stages > 1 else {'pskd_hard', 'pskd_soft'}
    assert keys | {'pskd_alpha'} <= regions.steps[-1]['outputs'].keys()
    entropies = [value for name, value in regions.steps[-1]['outputs'].items() if name.endswith('pskd_entropy')]
    assert len(entropies) == stages
    assert min(entropies) > 0
    assert (regions.steps[-1]['calls'][0][1] < 10).any()  # there were digits among the regions


class Anchors(Hook):
    """Keeps, for each training step, the batch as the model got it, the losses' inputs per call, and the logs."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.steps = []

    def before_train(self, runner):
        runner.model.register_forward_pre_hook(self._inputs, with_kwargs=True)
        runner.model.bbox_head.loss_cls.register_forward_hook(self._loss, with_kwargs=True)

    def _inputs(self, model, args, kwargs):
        self.steps.append(dict(inputs=kwargs['inputs'].clone(), samples=kwargs['data_samples'], calls=[]))

    def _loss(self, module, args, kwargs, output):
        self.steps[-1]['calls'].append((*(arg.detach().clone() for arg in args), kwargs, output.detach()))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1].update(epoch=runner.epoch, outputs={k: v.item() for k, v in outputs.items() if v.numel() == 1})


@pytest.mark.parametrize('model', ['retinanet', 'retinanet, evaluation mode', 'fcos', 'atss', 'retinanet, bfloat16'])
def test_loss_of_anchors_recomputed_from_the_previous_epochs_checkpoint(voc, tmp_path, monkeypatch, model):
    """The teacher's logits are those that its own head hands to its loss, for the same images and labels."""
    model, amp, mode = model.split(',')[0], 'bfloat16' in model, 'eval' if 'evaluation' in model else 'train'
    cfg = config(voc, tmp_path, dict(PSKD, teacher_mode=mode), model=model)
    if amp:
        bfloat16(monkeypatch, cfg)
    train(cfg, anchors := Anchors())
    teacher = MODELS.build(cfg.model)
    load_checkpoint(teacher, str(tmp_path / 'epoch_1.pth'), strict=True)
    teacher.train(mode == 'train')
    pasts = []
    teacher.bbox_head.loss_cls.register_forward_pre_hook(lambda module, args: pasts.append(args[0]))
    levels = {'retinanet': 3, 'fcos': 1, 'atss': 5}[model]
    for step in anchors.steps:
        assert len(step['calls']) == levels
        expected = sum(call[-1].item() for call in step['calls'])
        if step['epoch'] > 0:
            pasts.clear()
            with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=amp):
                teacher.bbox_head.loss(teacher.extract_feat(step['inputs']), step['samples'])
            soft = 0
            for past, (logits, _, *weight, kwargs, _) in zip(pasts, step['calls']):
                p, t = logits.double().sigmoid(), past.double().sigmoid()
                losses = -((t - p) ** 2) * (t * p.log() + (1 - t) * (1 - p).log())
                weight = weight[0][:, None] if weight else 1
                soft = soft + (losses * weight).sum().item() / float(kwargs['avg_factor'])
            expected = expected + 0.8 * soft
            # Under autocast the logits are bfloat16; the probabilities are not.
            assert step['outputs']['pskd_soft'] == pytest.approx(0.8 * soft, rel=1e-4)
        assert step['outputs']['loss_cls'] == pytest.approx(expected, rel=2e-2 if amp else 1e-4)
    if model == 'retinanet':  # some anchors were in the band between positive and negative
        assert any((call[2] == 0).any() for call in anchors.steps[-1]['calls'])


@pytest.fixture(scope='module')
def vanilla(voc, tmp_path_factory):
    """The weights that training without a hook gives; regions are sampled at random."""
    folder = tmp_path_factory.mktemp('vanilla')
    return {
        'faster-rcnn': train(config(voc, folder / 'f', **SAMPLED)).model.state_dict(),
        'retinanet': train(config(voc, folder / 'r', model='retinanet')).model.state_dict(),
    }


SAMPLED = {'model.train_cfg.rpn.sampler.num': 64, 'model.train_cfg.rcnn.sampler.num': 16}


@pytest.mark.parametrize(
    ('model', 'hooks'),
    [
        ('faster-rcnn', [dict(PSKD, alpha=1e-30), dict(CSKD, weight=1e-30)]),
        ('retinanet', [dict(PSKD, alpha=1e-30)]),
    ],
)
def test_with_next_to_no_weight_it_trains_to_the_vanilla_weights(voc, tmp_path, vanilla, model, hooks):
    """The teacher runs, but uses up no random number and touches no statistic of the student."""
    options = SAMPLED if model == 'faster-rcnn' else {}
    ours = train(config(voc, tmp_path, *hooks, model=model, **options)).model.state_dict()
    assert_same_state(ours, vanilla[model])


@pytest.mark.parametrize('model', ['faster-rcnn', 'cascade', 'retinanet'])
def test_nothing_but_the_past_copys_weights_is_added(voc, tmp_path, model):
    """The checkpoint loads strictly into the vanilla detector, which then predicts the same; nothing is optimised, and
    no feature map of the copy outlives its use."""
    runner = train(config(voc, tmp_path, PSKD, model=model))
    vanilla = MODELS.build(runner.cfg.model).eval()
    load_checkpoint(vanilla, str(tmp_path / 'epoch_2.pth'), strict=True)
    runner.model.eval()
    batch = next(iter(runner.val_dataloader))
    with torch.no_grad():
        ours, theirs = runner.model.test_step(batch)[0], vanilla.test_step(batch)[0]
    assert_same_state(dict(ours.pred_instances.items()), dict(theirs.pred_instances.items()))
    parameters = [p for group in runner.optim_wrapper.param_groups for p in group['params']]
    assert len(parameters) == len(list(vanilla.parameters()))
    hook = find_hook(runner, 'PSKDHook')
    assert all(p.grad is None for p in hook.past.model.parameters())
    held = [value for value in vars(hook).values() if isinstance(value, (tuple, dict, torch.Tensor))]
    held = [list(v.values()) if isinstance(v, dict) else v if isinstance(v, tuple) else [v] for v in held]
    assert sum(tensor.numel() for tensors in held for tensor in tensors if isinstance(tensor, torch.Tensor)) < 1000


@pytest.mark.parametrize('loop', ['epochs, all methods', 'iterations between two snapshots'])
def test_resume_is_exact(voc, tmp_path, loop):
    results = []
    for name in ('straight', 'resumed'):
        if 'all' in loop:
            cfg = config(voc, tmp_path / name, PSKD, CSKD, dict(type='EMAHook'), **FRSKD, **{'train_cfg.max_epochs': 3})
        else:
            cfg = by_iterations(config(voc, tmp_path / name, PSKD, model='retinanet'), 7, interval=5)
            cfg.custom_hooks[0].interval = 3
        if name == 'resumed':
            first = cfg.copy()
            first.experiment_name += '-first'
            train(first, StopAfter(2 if 'all' in loop else 5))
            cfg.resume = True
        train(cfg)
        results.append(torch.load((tmp_path / name / 'last_checkpoint').read_text()))
    for key in ('state_dict', 'optimizer'):
        assert_same_state(results[0][key], results[1][key])


def test_two_processes_have_one_teacher_and_one_model(voc, tmp_path):
    """All three methods at once."""
    (tmp_path / 'dump_models.py').write_text(
        """
import os, torch
from mmengine.hooks import Hook
class DumpModels(Hook):
    def after_train(self, runner):
        hook = next(h for h in runner.hooks if type(h).__name__ == 'PSKDHook')
        state = dict(teacher=hook.past.teacher.state_dict(), parameters=dict(runner.model.module.named_parameters()))
        torch.save(state, os.path.join(runner.work_dir, f'rank{runner.rank}.pth'))
"""
    )
    cfg = config(voc, tmp_path / 'run', PSKD, CSKD, dict(type='dump_models.DumpModels'), **FRSKD)
    cfg.train_dataloader.batch_size = 1
    train_in_processes(cfg, tmp_path)
    assert_same_state(*(torch.load(tmp_path / f'run/rank{rank}.pth') for rank in range(2)))


@pytest.mark.parametrize(
    ('hook', 'loss', 'message'),
    [
        (CSKDHook, dict(type='SeesawLoss', num_classes=10), 'with SeesawLoss'),
        (CSKDHook, dict(type='CrossEntropyLoss', use_sigmoid=True), 'with CrossEntropyLoss, .* use_sigmoid=False'),
        (PSKDHook, dict(type='FocalLoss', activated=True), 'with FocalLoss, and the past of a softmax'),
        (PSKDHook, dict(type='CrossEntropyLoss', use_sigmoid=True, class_weight=[1.0] * 11), 'without class_weight'),
    ],
)
def test_regions_that_are_not_classified_as_the_method_needs_are_refused(voc, tmp_path, hook, loss, message):
    options = {'model.roi_head.bbox_head.loss_cls': dict(loss, _delete_=True)}
    model = MODELS.build(config(voc, tmp_path, **options).model)
    with pytest.raises(ValueError, match=f'^{hook.__name__}: .*ConvFCBBoxHead classifies regions .*{message}'):
        hook().check(None, model)


@pytest.mark.parametrize(
    ('detector', 'message'),
    [
        ('maskformer/maskformer_r50_ms-16xb1-75e_coco.py', r'MaskFormer classifies the masks .* \(panoptic_head, Mask'),
        (
            'mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2019.py',
            r'classifies the masks .* \(track_head, Mask',
        ),
        (
            'masktrack_rcnn/masktrack-rcnn_mask-rcnn_r50_fpn_8xb1-12e_youtubevis2019.py',
            r'MaskTrackRCNN is a tracker around a detector \(MaskRCNN\): train the detector with PSKDHook',
        ),
        (
            'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
            'SoftTeacher has a teacher already',
        ),
    ],
)
def test_what_scores_no_boxes_of_the_students_is_refused_by_name(detector, message):
    model = MODELS.build(get_config(f'mmdet::{detector}').model)
    with pytest.raises(ValueError, match=f'PSKDHook: .*{message}'):
        PSKDHook().check(None, model)


def test_a_roi_head_that_trains_on_other_scores_is_an_error(voc, tmp_path):
    """As CrowdDet's, whose losses are of two predictions for each region."""
    cfg = config(voc, tmp_path, PSKD)

    class Elsewhere(Hook):
        def before_train(self, runner):
            head = runner.model.roi_head.bbox_head

            def loss(cls_score, *args, **kwargs):
                return dict(loss_cls=cls_score.sum())

            head.loss = loss

    with pytest.raises(RuntimeError, match='was never called while the model computed its loss'):
        train(cfg, Elsewhere())


def test_a_roi_head_that_reads_other_regions_first_is_an_error(voc, tmp_path):
    """As many of them, so that their number does not tell."""

    class Looks(Hook):
        priority = 'LOW'  # after the copy was made

        def before_train(self, runner):
            head = runner.model.roi_head
            forward = head._bbox_forward

            def looks(feats, rois):
                head.bbox_roi_extractor(feats[: head.bbox_roi_extractor.num_inputs], rois.flip(0))
                return forward(feats, rois)

            head._bbox_forward = looks

    with pytest.raises(RuntimeError, match='for those that it reads first'):
        train(config(voc, tmp_path, PSKD), Looks())


def test_a_roi_head_that_reads_its_regions_elsewhere_is_an_error(voc, tmp_path):
    class Elsewhere(Hook):
        priority = 'LOW'  # after the copy was made

        def before_train(self, runner):
            runner.model.roi_head.bbox_roi_extractor._forward_pre_hooks.clear()  # as if it read by another

    with pytest.raises(RuntimeError, match='bbox_roi_extractor has not read'):
        train(config(voc, tmp_path, PSKD), Elsewhere())


def test_options_of_the_other_kind_of_detector_are_refused(voc, tmp_path):
    with pytest.raises(ValueError, match="regions and anchors keep no identity .* set teacher='snapshot' or 'ema'"):
        train(config(voc, tmp_path, dict(PSKD, teacher='bank')))
    with pytest.raises(ValueError, match='background=False is for two-stage'):
        train(config(voc, tmp_path, dict(PSKD, background=False), model='retinanet'))
    with pytest.raises(ValueError, match='keep_hard=False is for two-stage'):
        train(config(voc, tmp_path, dict(PSKD, keep_hard=False), model='retinanet'))
    with pytest.raises(ValueError, match='CSKDHook: RetinaNet has no RoI head'):
        train(config(voc, tmp_path, CSKD, model='retinanet'))
