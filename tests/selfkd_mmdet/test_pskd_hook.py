"""PS-KD of regions in real MMDetection training runs."""

import os
import subprocess
import sys

import make_toy_data
import pytest
import torch
import torch.nn.functional as F
from mm_runs import ROOT, assert_same_state, by_iterations, counter, train
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import load_checkpoint

PSKD = dict(type='selfkd_mmdet.PSKDHook', alpha=0.8)


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    folder = tmp_path_factory.mktemp('VOCdevkit')
    make_toy_data.voc(folder, train_size=4, test_size=2)
    return folder


def config(voc, work_dir, *hooks, **options) -> Config:
    """Faster R-CNN R-18, 4 images of 64 x 64, batches of 2, 2 epochs; no region is sampled at random."""
    cfg = Config.fromfile(ROOT / 'configs/mmdet/baseline/faster-rcnn_r18_fpn_digits.py')
    cfg.merge_from_dict(
        {
            'train_dataloader.dataset.data_root': f'{voc}/',
            'val_dataloader.dataset.data_root': f'{voc}/',
            'test_dataloader.dataset.data_root': f'{voc}/',
            'train_dataloader.batch_size': 2,
            'train_cfg.max_epochs': 2,
            'train_cfg.val_interval': 100,
            'default_hooks.checkpoint.max_keep_ckpts': 5,
            'model.train_cfg.rpn.sampler.num': 10**6,
            'model.train_cfg.rcnn.sampler.num': 10**4,
            'model.train_cfg.rpn_proposal.max_per_img': 20,
            'work_dir': str(work_dir),
            'experiment_name': f'det{next(counter)}',
            'log_level': 'ERROR',
        }
    )
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='Resize', scale=(64, 64)))
    cfg.merge_from_dict(options)
    cfg.custom_hooks = [ConfigDict(hook) for hook in hooks]
    return cfg


def bbox_heads(model):
    heads = model.roi_head.bbox_head
    return list(heads) if isinstance(heads, torch.nn.ModuleList) else [heads]


class Regions(Hook):
    """Keeps, for each training step and stage, the regions, what went through the loss module, and the logs."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.steps, self.training = [], False

    def before_train(self, runner):
        model, head = runner.model, runner.model.roi_head
        self.stages = len(bbox_heads(model))
        model.register_forward_pre_hook(self._inputs, with_kwargs=True)
        extractors = head.bbox_roi_extractor if self.stages > 1 else [head.bbox_roi_extractor]
        for extractor in extractors:
            extractor.register_forward_pre_hook(self._rois)
        for bbox_head in bbox_heads(model):
            bbox_head.loss_cls.register_forward_hook(self._loss, with_kwargs=True)

    def _inputs(self, model, args, kwargs):
        self.training = kwargs['mode'] == 'loss'
        if self.training:
            self.steps.append(dict(inputs=kwargs['inputs'].clone(), rois=[], calls=[]))

    def _rois(self, module, args):
        if self.training:
            self.steps[-1]['rois'].append(args[1].clone())

    def _loss(self, module, args, kwargs, output):
        logits, label, weight = args
        self.steps[-1]['calls'].append((logits.detach().clone(), label, weight, kwargs['avg_factor']))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1].update(epoch=runner.epoch, outputs={k: v.item() for k, v in outputs.items() if v.numel() == 1})


CASCADE = dict(
    type='CascadeRoIHead',
    _delete_=True,
    num_stages=2,
    stage_loss_weights=[1, 0.5],
    bbox_roi_extractor=dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
        out_channels=64,
        featmap_strides=[4, 8, 16, 32],
    ),
    bbox_head=[
        dict(
            type='Shared2FCBBoxHead',
            in_channels=64,
            fc_out_channels=32,
            num_classes=10,
            reg_class_agnostic=True,
            loss_cls=dict(type='CrossEntropyLoss', loss_weight=1.0),
            loss_bbox=dict(type='SmoothL1Loss'),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
        )
    ]
    * 2,
)


@pytest.mark.parametrize('case', ['faster', 'faster, hard background', 'cascade'])
def test_loss_recomputed_from_the_previous_epochs_checkpoint(voc, tmp_path, case):
    cfg = config(voc, tmp_path, dict(PSKD, background='hard' not in case))
    if case == 'cascade':
        rcnn = cfg.model.train_cfg.rcnn
        cfg.model.merge(ConfigDict(roi_head=ConfigDict(CASCADE)))
        cfg.model.type, cfg.model.train_cfg.rcnn = 'CascadeRCNN', [rcnn, rcnn]
    train(cfg, regions := Regions())
    teacher = MODELS.build(cfg.model).eval()
    load_checkpoint(teacher, str(tmp_path / 'epoch_1.pth'), strict=True)
    for step in regions.steps:
        alpha = 0.8 * (step['epoch'] + 1) / 2
        assert len(step['calls']) == regions.stages
        for stage, (logits, label, weight, avg_factor) in enumerate(step['calls']):
            target = F.one_hot(label, 11).double()
            if step['epoch'] > 0:
                with torch.no_grad():
                    feats = teacher.extract_feat(step['inputs'])
                    arguments = (stage, feats) if case == 'cascade' else (feats,)
                    past = teacher.roi_head._bbox_forward(*arguments, step['rois'][stage])['cls_score'].softmax(1)
                if 'hard' in case:
                    past[label == 10] = F.one_hot(torch.tensor(10), 11).float()
                target = (1 - alpha) * target + alpha * past
            expected = -((target * logits.double().log_softmax(1)).sum(1) * weight).sum() / avg_factor
            name = f's{stage}.loss_cls' if case == 'cascade' else 'loss_cls'
            factor = [1, 0.5][stage] if case == 'cascade' else 1
            assert step['outputs'][name] == pytest.approx(factor * expected.item(), rel=1e-4)
    keys = {'s0.pskd_hard', 's1.pskd_soft'} if case == 'cascade' else {'pskd_hard', 'pskd_soft'}
    assert keys | {'pskd_alpha'} <= regions.steps[-1]['outputs'].keys()
    assert (regions.steps[-1]['calls'][0][1] < 10).any()  # there were digits among the regions


@pytest.mark.parametrize('alpha', [0.0, 1e-30])
def test_weight_0_trains_to_the_vanilla_weights(voc, tmp_path, alpha):
    """At 1e-30 the teacher runs: it uses up no random number, and touches no statistic of the student."""
    sampled = {'model.train_cfg.rpn.sampler.num': 64, 'model.train_cfg.rcnn.sampler.num': 16}  # at random
    vanilla = train(config(voc, tmp_path / 'vanilla', **sampled)).model.state_dict()
    ours = train(config(voc, tmp_path / 'ours', dict(PSKD, alpha=alpha), **sampled)).model.state_dict()
    assert_same_state(ours, vanilla)


def test_checkpoint_loads_strictly_into_the_vanilla_detector_and_predicts_the_same(voc, tmp_path):
    runner = train(config(voc, tmp_path, PSKD, **{'train_cfg.max_epochs': 1}))
    vanilla = MODELS.build(runner.cfg.model).eval()
    load_checkpoint(vanilla, str(tmp_path / 'epoch_1.pth'), strict=True)
    runner.model.eval()
    batch = next(iter(runner.val_dataloader))
    with torch.no_grad():
        ours, theirs = runner.model.test_step(batch)[0], vanilla.test_step(batch)[0]
    assert_same_state(dict(ours.pred_instances.items()), dict(theirs.pred_instances.items()))


@pytest.mark.parametrize('loop', ['epochs', 'iterations between two snapshots'])
def test_resume_is_exact(voc, tmp_path, loop):
    results = []
    for name in ('straight', 'resumed'):
        cfg = config(voc, tmp_path / name, PSKD, **{'train_cfg.max_epochs': 3})
        if loop != 'epochs':
            by_iterations(cfg, 7, interval=5)
            cfg.custom_hooks[0].interval = 3
        if name == 'resumed':
            first = cfg.copy()
            first.experiment_name += '-first'
            stop = 2 if loop == 'epochs' else 5
            train(first, StopAfter(stop))
            cfg.resume = True
        train(cfg)
        results.append(torch.load((tmp_path / name / 'last_checkpoint').read_text()))
    for key in ('state_dict', 'optimizer'):
        assert_same_state(results[0][key], results[1][key])


class StopAfter(Hook):
    """Ends training after so many epochs or iterations, without changing the totals that the schedule depends on."""

    priority = 'LOWEST'

    def __init__(self, count):
        self.count = count

    def after_train_epoch(self, runner):
        runner.train_loop.stop_training |= runner.epoch + 1 == self.count

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.max_epochs == 1:  # iteration-based
            runner.train_loop.stop_training |= runner.iter + 1 == self.count


def test_two_processes_have_one_teacher(voc, tmp_path):
    (tmp_path / 'dump_teacher.py').write_text(
        """
import os, torch
from mmengine.hooks import Hook
class DumpTeacher(Hook):
    def after_train(self, runner):
        hook = next(h for h in runner.hooks if type(h).__name__ == 'PSKDHook')
        torch.save(hook.teacher.state_dict(), os.path.join(runner.work_dir, f'rank{runner.rank}.pth'))
"""
    )
    cfg = config(voc, tmp_path / 'run', PSKD, dict(type='dump_teacher.DumpTeacher'))
    cfg.dump(tmp_path / 'config.py')
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([str(ROOT / 'plugins'), str(ROOT / 'tests'), str(tmp_path)]),
    }
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    command += [str(ROOT / 'tools/train.py'), str(tmp_path / 'config.py'), '--launcher', 'pytorch']
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert_same_state(*(torch.load(tmp_path / f'run/rank{rank}.pth') for rank in range(2)))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'model.roi_head.bbox_head.loss_cls': dict(type='SeesawLoss', num_classes=10, _delete_=True)},
            'Shared2FCBBoxHead classifies regions with SeesawLoss',
        ),
        (
            {'model.roi_head.bbox_head.loss_cls.use_sigmoid': True},
            'classifies regions with CrossEntropyLoss, .* use_sigmoid=False',
        ),
    ],
)
def test_losses_that_are_no_softmax_are_refused(voc, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(config(voc, tmp_path, PSKD, **options))


def test_one_stage_detectors_are_refused_by_name(voc, tmp_path):
    cfg = config(voc, tmp_path, PSKD)
    cfg.model = Config.fromfile(ROOT / 'tests/selfkd_mmdet/retinanet.py').model
    with pytest.raises(ValueError, match='RetinaNet with the RoI head NoneType is not supported: it needs a two-stage'):
        train(cfg)
