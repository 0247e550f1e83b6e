"""Small real runs of mmengine's Runner over the digits, for the OpenMMLab plugins' tests."""

import collections
import itertools
import sys

import mmengine.config.config
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner

from helpers import ROOT
from helpers.processes import in_processes
from selfkd.cli import main as selfkd

counter = itertools.count()
# Laying out the config's text takes half of a run as small as these.
mmengine.config.config.FormatCode = lambda text, **style: (text, True)


def place(cfg, data, work_dir) -> None:
    """Has a toy config read ``data`` and write to ``work_dir``, quietly."""
    for part in ('train', 'val', 'test'):
        cfg[f'{part}_dataloader'].dataset.data_root = f'{data}/'
    cfg.work_dir, cfg.experiment_name, cfg.log_level = str(work_dir), f'run{next(counter)}', 'ERROR'


def digits_config(digits, work_dir, *hooks, **options) -> Config:
    """The digits config with a tiny network: 40 images, batches of 8, 3 epochs. Options use dotted keys."""
    cfg = Config.fromfile(ROOT / 'configs/mmpretrain/_base_/digits.py')
    cfg.merge_from_dict(
        {
            'model.backbone.base_channels': 4,
            'model.backbone.stem_channels': 4,
            'model.head.in_channels': 32,
            'train_dataloader.batch_size': 8,
            'train_cfg.max_epochs': 3,
            'train_cfg.val_interval': 100,
        }
    )
    place(cfg, digits, work_dir)
    cfg.merge_from_dict(options)
    cfg.custom_hooks = [ConfigDict(hook) for hook in hooks]
    return cfg


def by_iterations(cfg, max_iters, **checkpoint) -> Config:
    """Turns an epoch-based config into an iteration-based one."""
    cfg.train_dataloader.sampler.type = 'InfiniteSampler'
    cfg.train_cfg = ConfigDict(by_epoch=False, max_iters=max_iters, val_interval=1000)
    cfg.param_scheduler = ConfigDict(type='MultiStepLR', by_epoch=False, milestones=[1000])
    cfg.default_hooks.checkpoint = ConfigDict(type='CheckpointHook', by_epoch=False, **{'interval': 1000, **checkpoint})
    return cfg


def train(cfg, *hooks) -> Runner:
    runner = Runner.from_cfg(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner


def train_in_processes(cfg: Config, folder, processes: int = 2) -> str:
    """Trains by ``selfkd train`` into ``folder/run``, which modules in ``folder`` may extend; returns its output.

    The processes have what torchrun would give them; test_runners.py runs it under torchrun itself.
    """
    cfg.dump(folder / 'config.py')
    launcher = ['--launcher', 'pytorch'] if processes > 1 else []
    arguments = ['train', folder / 'config.py', '--work-dir', folder / 'run', *launcher]

    def work(rank):
        sys.path.insert(0, str(folder))
        selfkd([str(argument) for argument in arguments])

    in_processes(folder, work, processes)
    return '\n'.join((folder / f'rank{rank}.txt').read_text() for rank in range(processes))


def find_hook(runner, kind):
    return next(hook for hook in runner.hooks if type(hook).__name__ == kind)


def assert_same_state(a, b) -> None:
    """Nested dicts and lists of tensors and numbers that are equal to the last bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_state(x, y)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    else:
        assert a == b


@TRANSFORMS.register_module()
class FlipEverySecondTime:
    """Two views of an image that is loaded twice; unlike a random augmentation's, a resumed run has the same ones."""

    def __init__(self):
        self.times = collections.Counter()

    def __call__(self, results):
        self.times[results['img_path']] += 1
        if self.times[results['img_path']] % 2 == 0:
            results['img'] = results['img'][:, ::-1].copy()
        return results


class Recorder(Hook):
    """Keeps what went through the head's loss module in each training step, and the loss that was trained on."""

    priority = 'VERY_HIGH'  # its tap is set before any plugin's: it sees the loss module's own value

    def __init__(self):
        self.steps = []

    def before_train(self, runner):
        model = getattr(runner.model, 'module', runner.model)
        model.head.loss_module.register_forward_hook(self._record, with_kwargs=True)
        model.register_forward_pre_hook(self._inputs, with_kwargs=True)

    def _inputs(self, model, args, kwargs):
        self.training = kwargs.get('mode') == 'loss'
        if self.training:
            self.steps.append({'inputs': kwargs['inputs'].clone()})

    def _record(self, module, args, kwargs, output):
        if self.training:
            logits, label = args
            self.steps[-1].update(logits=logits.detach().clone(), label=label.clone(), plain=output.detach().clone())

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.paths = [sample.img_path for sample in data_batch['data_samples']]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1].update(
            paths=self.paths, epoch=runner.epoch, iter=runner.iter, **{k: v.item() for k, v in outputs.items()}
        )
