"""FRSKD in real MMDetection training runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.mmdet import CSKD, FRSKD, PSKD, bbox_heads, bfloat16, config
from helpers.mmengine import assert_same_state, train
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import CascadeRoIHead, Shared2FCBBoxHead, StandardRoIHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import load_checkpoint
from mmengine.structures import InstanceData
from mmengine.utils import get_installed_path
from survey import shrink

from selfkd.losses import attention_transfer
from selfkd.publish import publish_checkpoint, strip_self_teacher
from selfkd_mmdet import FRSKDRoIHead
from selfkd_mmdet.heads import per_stage
from selfkd_mmengine.train import main


class Watch(Hook):
    """Keeps the RoI head before each step, what its stages were given to classify, how they did, and the losses."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.steps = []

    def before_train(self, runner):
        extractors = runner.model.roi_head.bbox_roi_extractor
        for extractor in extractors if isinstance(extractors, torch.nn.ModuleList) else [extractors]:
            extractor.register_forward_pre_hook(self._regions)
        runner.model.roi_head.self_teacher['pyramid'].register_forward_hook(self._refined)
        for head in bbox_heads(runner.model):
            head.loss_cls.register_forward_hook(self._loss, with_kwargs=True)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        head = runner.model.roi_head
        self.steps.append({'head': copy.deepcopy(head), 'rois': [], 'calls': [], 'refined': 0})
        for module in self.steps[-1]['head'].modules():
            module._forward_hooks.clear(), module._forward_pre_hooks.clear()

    def _refined(self, module, args, output):
        self.steps[-1]['refined'] += 1

    def _regions(self, module, args):
        self.steps[-1].setdefault('regions', tuple(f.detach() for f in args[0]))
        self.steps[-1]['rois'].append(args[1])

    def _loss(self, module, args, kwargs, output):
        self.steps[-1]['calls'].append((args[0].detach(), args[1]))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1]['outputs'] = {k: v.item() for k, v in outputs.items()}


def one_sample(extractor):
    """The detector's RoI extractor, but with one sample for each point."""
    extractor = copy.deepcopy(extractor)
    for layer in extractor.roi_layers:
        layer.sampling_ratio = 1
    return extractor


@pytest.mark.parametrize(
    'case', ['faster-rcnn', 'mask', 'beta 0', 'cascade', 'cascade, own extractors', 'cascade mask']
)
def test_losses_recomputed(voc, tmp_path, case):
    """Every term of every step in the paper's words, in every stage; the self-teacher learns from the labels alone."""
    options = {
        'model.roi_head.temperature': 4.0,
        'model.roi_head.alpha': 1.5,
        'model.roi_head.beta': 0.0 if case == 'beta 0' else 30.0,
        'train_cfg.max_epochs': 1,
    }
    weights, cascade = {'': 1}, 'cascade' in case
    if cascade:
        weights = {'s0.': 0.5, 's1.': 0.25}
        options['model.roi_head.stage_loss_weights'] = list(weights.values())
    model = 'faster-rcnn' if case == 'beta 0' else case.split(',')[0]
    cfg = config(voc, tmp_path, model=model, **FRSKD, **options)
    if 'own extractors' in case:  # the second stage reads its regions from finer maps
        reader = cfg.model.roi_head.bbox_roi_extractor
        cfg.model.roi_head.bbox_roi_extractor = [reader, {**reader, 'finest_scale': 10**4}]
    train(cfg, watch := Watch())
    assert len(watch.steps) == 2
    for step in watch.steps:
        head, feats = step['head'], step['regions']
        maps, expected = head.self_teacher['pyramid'](feats), {}
        assert (step['refined'], len(step['calls'])) == (1, len(weights))
        for stage, (prefix, weight) in enumerate(weights.items()):
            z, y = step['calls'][stage]
            teacher = head.self_teacher['bbox_head'][stage]
            read = one_sample(per_stage(head.bbox_roi_extractor)[stage])(maps, step['rois'][stage])
            for layer in teacher.shared_convs:
                read = layer(read)
            read = read.flatten(1)
            for layer in teacher.shared_fcs:
                read = layer(read).relu()
            t = teacher.fc_cls(read)
            p, q = F.softmax(t / 4, 1), F.softmax(z / 4, 1)
            expected[f'{prefix}loss_teacher'] = weight * F.cross_entropy(t, y)
            expected[f'{prefix}loss_kd'] = weight * 1.5 * 16 * (p * (p / q).log()).sum(1).mean()
            assert (y < 10).any()
        if case != 'beta 0':
            expected['loss_feature'] = 30 * sum(attention_transfer(f, m) for f, m in zip(feats, maps))
        assert set(taught_losses(step['outputs'])) == set(expected)
        for name, value in expected.items():
            assert step['outputs'][name] == pytest.approx(value.item(), rel=1e-3), name
        assert any('loss_mask' in name for name in step['outputs']) == ('mask' in case)


@pytest.mark.parametrize('model', ['faster-rcnn', 'cascade'])
def test_only_the_labels_teach_the_self_teacher_and_both_teach_the_network(voc, tmp_path, model):
    class Gradients(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            model = runner.model
            losses = model(**model.data_preprocessor(data_batch, True), mode='loss')
            teacher = list(model.roi_head.self_teacher.parameters())
            stem = model.backbone.conv1.weight
            self.learns = [False] * len(teacher)
            self.terms = taught_losses(losses)
            for name, term in self.terms.items():
                *own, to_stem = torch.autograd.grad(term, [*teacher, stem], retain_graph=True, allow_unused=True)
                assert to_stem.abs().sum() > 0, name
                if 'loss_teacher' in name:
                    self.learns = [before or g is not None for before, g in zip(self.learns, own)]
                else:
                    assert all(g is None for g in own), name

    train(config(voc, tmp_path, model=model, **FRSKD, **{'train_cfg.max_epochs': 1}), watch := Gradients())
    assert len(watch.terms) == (5 if model == 'cascade' else 3)
    assert all(watch.learns)


def taught_losses(losses):
    return {name: term for name, term in losses.items() if name.split('loss_')[-1] in ('teacher', 'kd', 'feature')}


@pytest.mark.parametrize(
    ('model', 'empty', 'expected'),
    [
        ('faster-rcnn', 0, set()),
        ('cascade', 0, set()),
        ('cascade', 1, {'s0.loss_teacher', 's0.loss_kd', 'loss_feature'}),
    ],
)
def test_stages_without_regions_are_left_out(voc, tmp_path, model, empty, expected):
    head = MODELS.build(config(voc, tmp_path, model=model, **FRSKD).model).roi_head

    def regions(number):
        return [InstanceData(bboxes=torch.tensor([[4.0, 4, 20, 20]] * number).view(number, 4))]

    if empty == 1:
        head.bbox_head[0].refine_bboxes = lambda *args: regions(0)
    feats = [torch.rand(1, 32, size, size, requires_grad=True) for size in (16, 8, 4, 2)]
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64)))
    sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    losses = head.loss(feats, regions(3 if empty else 0), [sample])
    assert set(taught_losses(losses)) == expected
    sum(loss for name, loss in losses.items() if 'loss' in name).backward()


@pytest.mark.parametrize('model', ['faster-rcnn', 'cascade'])
def test_first_step_has_the_vanilla_losses(voc, tmp_path, model):
    """From the same seed the network starts the same, and its own losses are MMDetection's own, also where regions are
    sampled at random."""
    sampled = {f'model.train_cfg.{part}.sampler.num': 16 for part in ('rpn', 'rcnn')} if model != 'cascade' else {}

    class First(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 0:
                self.losses = {k: v for k, v in outputs.items() if 'loss_' in k}

    hooks = First(), First()
    for hook, chosen in zip(hooks, ({}, FRSKD)):
        cfg = config(voc, tmp_path / str(len(chosen)), model=model, **chosen, **sampled, **{'train_cfg.max_epochs': 1})
        train(cfg, hook)
    vanilla, ours = (hook.losses for hook in hooks)
    assert set(ours) - set(vanilla) == set(taught_losses(ours)) != set()
    assert_same_state({name: ours[name] for name in vanilla}, vanilla)


@pytest.mark.parametrize('model', ['faster-rcnn', 'cascade'])
def test_the_self_teacher_starts_as_the_detectors_box_head(voc, tmp_path, model):
    """MMDetection initialises classifiers with small weights; torch's are five times those."""

    class Start(Hook):
        def before_train(self, runner):
            head = runner.model.roi_head
            self.pairs = list(zip(bbox_heads(runner.model), head.self_teacher['bbox_head']))
            self.spread = [[m.weight.std().item() for m in (h.fc_cls, *h.shared_fcs)] for h in sum(self.pairs, ())]

    train(config(voc, tmp_path, model=model, **FRSKD, **{'train_cfg.max_epochs': 1}), start := Start())
    for own, teacher in zip(start.spread[::2], start.spread[1::2]):
        assert own[0] == pytest.approx(0.01, rel=0.1)
        assert teacher == pytest.approx(own, rel=0.1)


def test_published_checkpoint_loads_strictly_into_the_vanilla_detector_and_predicts_the_same(voc, tmp_path):
    """Of Cascade Mask R-CNN, with PS-KD beside; inference does not call the self-teacher."""
    model = 'cascade mask'
    runner = train(config(voc, tmp_path, PSKD, model=model, **FRSKD))
    dropped = publish_checkpoint(str(tmp_path / 'epoch_2.pth'), str(tmp_path / 'published.pth'))
    assert dropped == len(runner.model.roi_head.self_teacher.state_dict())
    plain = config(voc, tmp_path / 'plain', model=model).model
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
        ('faster-rcnn', {'model.roi_head.bbox_head.loss_cls.use_sigmoid': True}, 'use_sigmoid=False'),
        ('faster-rcnn', {'model.roi_head.alpha': -1}, 'alpha must be at least 0, got -1'),
        ('cascade', {'model.roi_head.bbox_roi_extractor.featmap_strides': [8]}, 'regions are read from 1 level'),
        ('cascade', {'model.roi_head.bbox_head.1.loss_cls.use_sigmoid': True}, 'use_sigmoid=False'),
        ('dynamic', {}, 'model.train_cfg.rcnn.dynamic_rcnn of DynamicRoIHead, which would be lost in StandardRoIHead'),
        ('mask scoring', {}, 'model.roi_head.mask_iou_head of MaskScoringRoIHead'),
        ('cascade', {'model.roi_head.interleaved': True}, 'of HybridTaskCascadeRoIHead, .* lost in CascadeRoIHead'),
    ],
)
def test_what_cannot_work_is_refused(voc, tmp_path, model, options, message):
    with pytest.raises(ValueError, match=f'FRSKDRoIHead: .*{message}'):
        MODELS.build(config(voc, tmp_path, model=model, **FRSKD, **options).model)


def test_detectors_without_regions_do_not_take_the_option(voc, tmp_path):
    with pytest.raises(TypeError, match="RetinaNet.*unexpected keyword argument 'roi_head'"):
        MODELS.build(config(voc, tmp_path, model='retinanet', **FRSKD).model)


def test_the_head_is_a_copyable_one_of_the_replaced_kind(voc, tmp_path):
    for model, name in (('faster-rcnn', 'StandardRoIHead'), ('cascade', 'CascadeRoIHead')):
        head = MODELS.build(config(voc, tmp_path, model=model, **FRSKD).model).roi_head
        for same in (head, copy.deepcopy(head)):
            assert isinstance(same, FRSKDRoIHead)
            assert isinstance(same, MODELS.get(name))


@pytest.mark.parametrize('kind', ['RoIAlign', RoIAlign])
def test_the_self_teacher_takes_one_sample_for_each_point(voc, tmp_path, kind):
    """However the config names the layer: new-style configs give the class."""
    cfg = config(voc, tmp_path, model='cascade', **FRSKD)
    cfg.model.roi_head.bbox_roi_extractor.roi_layer = dict(type=kind, output_size=7, sampling_ratio=0)
    head = MODELS.build(cfg.model).roi_head
    ratios = [[layer.sampling_ratio for layer in reader.roi_layers] for reader in head.self_teacher['roi_extractor']]
    assert ratios == [[1, 1]] * 2  # of each level, in each stage
    assert head.bbox_roi_extractor[0].roi_layers[0].sampling_ratio == 0


def test_a_validation_loss_is_the_toolkits(voc, tmp_path):
    """In evaluation mode, or without gradients."""
    head = MODELS.build(config(voc, tmp_path, **FRSKD).model).roi_head
    feats = [torch.rand(1, 32, size, size) for size in (16, 8, 4, 2)]
    sample = DetDataSample(gt_instances=InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long()))

    def losses():
        return taught_losses(head.loss(feats, [InstanceData(bboxes=torch.tensor([[4.0, 4, 20, 20]]))], [sample]))

    assert len(losses()) == 3
    with torch.no_grad():
        assert not losses()
    head.eval()
    assert not losses()


class OwnHead:
    """What a project's RoI head adds."""

    def loss(self, *args):
        return {**super().loss(*args), 'loss_own': next(self.parameters()).square().sum()}


class OwnRoIHead(OwnHead, StandardRoIHead):
    pass


class OwnCascadeRoIHead(OwnHead, CascadeRoIHead):
    pass


class OtherwiseRoIHead(StandardRoIHead):
    """Computes its losses in a way of its own."""

    def loss(self, *args):
        return {'loss_own': next(self.parameters()).square().sum()}


class OwnBBoxHead(Shared2FCBBoxHead):
    pass


@pytest.fixture
def own():
    """A project's own registry, which is the default scope: a child of MMDetection's, as mmrotate has one."""
    registry = Registry('model', parent=MODELS, scope='own')
    yield registry
    del MODELS._children['own']


@pytest.mark.parametrize(('model', 'kind'), [('faster-rcnn', OwnRoIHead), ('cascade', OwnCascadeRoIHead)])
def test_a_roi_head_of_ones_own_keeps_its_loss(voc, tmp_path, own, model, kind):
    """The option took the place of its name: it is asked for, and the self-teacher comes beside what the class does."""
    own.register_module(module=kind)
    cfg = config(voc, tmp_path, model=model, **FRSKD, **{'train_cfg.max_epochs': 1})
    with pytest.raises(ValueError, match=f'FRSKDRoIHead: .*set model.roi_head.base_type to .*{kind.__name__}'):
        MODELS.build(cfg.model)
    for base_type in (f'own.{kind.__name__}', kind):
        cfg.model.roi_head.base_type = base_type
        head = MODELS.build(cfg.model).roi_head
        assert isinstance(head, FRSKDRoIHead)
        assert isinstance(head, kind)
    cfg.model.roi_head.base_type = f'own.{kind.__name__}'
    train(cfg, watch := Watch())
    assert all(step['outputs']['loss_own'] > 0 for step in watch.steps)
    assert len(taught_losses(watch.steps[0]['outputs'])) == (5 if model == 'cascade' else 3)
    torch.save(head, tmp_path / 'head.pth')
    for same in (copy.deepcopy(head), torch.load(tmp_path / 'head.pth')):
        assert type(same) is type(head)
        assert_same_state(same.state_dict(), head.state_dict())


def test_own_heads_that_cannot_be_taught_are_refused(voc, tmp_path, own):
    own.register_module(module=OtherwiseRoIHead)
    own.register_module(module=OwnBBoxHead)
    cfg = config(voc, tmp_path, **FRSKD, **{'model.roi_head.base_type': 'own.OtherwiseRoIHead'})
    with pytest.raises(RuntimeError, match='OtherwiseRoIHead computed its losses without a call of bbox_loss'):
        train(cfg)
    cfg.model.roi_head.base_type = 'StandardRoIHead'
    cfg.model.roi_head.bbox_head.type = 'OwnBBoxHead'
    with DefaultScope.overwrite_default_scope('own'), pytest.raises(
        ValueError, match='got .*bbox_head.type=OwnBBoxHead'
    ):
        MODELS.build(cfg.model)
    cfg.model.roi_head.base_type = 'RPNHead'
    with pytest.raises(ValueError, match='model.roi_head.base_type must name StandardRoIHead'):
        MODELS.build(cfg.model)


def test_a_model_that_ignores_the_option_is_refused_by_selfkd_train(tmp_path):
    """MMDetection's RPN takes any option of its model, and leaves out without a word what it does not know."""
    cfg = shrink(
        Config.fromfile(f'{get_installed_path("mmdet")}/.mim/configs/rpn/rpn_r50_fpn_1x_coco.py'),
        'mmdet',
        str(tmp_path),
    )
    cfg.dump(tmp_path / 'rpn.py')
    options = ['--work-dir', str(tmp_path), '--cfg-options', 'model.roi_head.type=selfkd_mmdet.FRSKDRoIHead']
    with pytest.raises(ValueError, match='FRSKDRoIHead: the config asks for it, but RPN was built without it'):
        main([str(tmp_path / 'rpn.py'), *options])
