"""What test_loops.py runs in 1, 2 and 4 processes: short runs in loops of both kinds, and what PS-KD counts in them.

Arguments: the folder of the digits, and one for the results.
"""

import gc
import json
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import mmengine.runner.loops
import torch.multiprocessing as mp
from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS

from helpers.mmengine import by_iterations, digits_config, find_hook, train
from helpers.processes import free_port
from selfkd_mmengine.launch import leave_group, prepare_cpu_launch

GLOBAL_BATCH = 8
BANK = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)
SNAPSHOT = dict(BANK, teacher='snapshot')


@DATASETS.register_module(force=True)
class SizedDigits(CustomDataset):
    """Digits whose annotations have a width and a height, some upright, as AspectRatioBatchSampler asks for."""

    def get_data_info(self, idx):
        return {**super().get_data_info(idx), 'width': 8 + idx % 3, 'height': 9}


class Count(Hook):
    """Notes alpha in each step, and the steps before which the past was refreshed or the bank exchanged."""

    priority = 'LOWEST'

    def __init__(self):
        self.alphas, self.refreshes, self.exchanges = [], [], []

    def before_train(self, runner):
        self.hook, self.runner = find_hook(runner, 'PSKDHook'), runner
        if self.hook.source == 'snapshot':
            self._spy(self.hook.past.teacher, 'update', self.refreshes)
        else:
            self._spy(self.hook.past, 'synchronize', self.exchanges)

    def _spy(self, owner, name, steps):
        original = getattr(owner, name)

        def spy(*args):
            steps.append(self.runner.iter)
            return original(*args)

        setattr(owner, name, spy)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.alphas.append(round(self.hook.current_alpha, 6))


def cases(digits, folder):
    """name -> config"""

    def config(hook, *hooks, **options):
        cfg = digits_config(digits, folder / f'rank{get_rank()}', hook, *hooks, **options)
        cfg.model.backbone.update(num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
        cfg.model.head.in_channels = 4
        cfg.train_dataloader.batch_size = GLOBAL_BATCH // get_world_size()
        cfg.train_dataloader.dataset.indices = 39
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        cfg.launcher = 'pytorch' if get_world_size() > 1 else 'none'
        return cfg

    yield 'epochs, bank', config(BANK)
    yield 'iterations, snapshot', by_iterations(config(SNAPSHOT), 12)
    yield 'iterations, snapshot in eval mode', by_iterations(config(dict(SNAPSHOT, teacher_mode='eval')), 12)
    pairs = by_iterations(config(BANK, dict(type='selfkd_mmpretrain.CSKDHook')), 12)
    pairs.train_dataloader.batch_sampler = dict(type='selfkd_mmengine.PairBatchSampler')
    yield 'iterations, bank, pairs', pairs
    if get_world_size() == 4:
        return
    yield 'epochs, snapshot, accumulation', config(SNAPSHOT, **{'optim_wrapper.accumulative_counts': 2})
    cfg = config(BANK, **{'optim_wrapper.accumulative_counts': 2, 'train_dataloader.drop_last': True})
    yield 'iterations, bank, accumulation, drop_last', by_iterations(cfg, 12)
    sliced = by_iterations(config(BANK, **{'train_dataloader.num_batch_per_epoch': 3}), 12)
    yield 'iterations, bank, num_batch_per_epoch', sliced
    if find_spec('mmdet'):
        ratios = by_iterations(config(SNAPSHOT), 12)
        ratios.train_dataloader.dataset.type = 'SizedDigits'
        ratios.train_dataloader.batch_sampler = dict(type='mmdet.AspectRatioBatchSampler')
        yield 'iterations, snapshot, aspect ratios', ratios
    finite = by_iterations(config(SNAPSHOT), 12)
    finite.train_dataloader.sampler.type = 'DefaultSampler'
    yield 'iterations, snapshot, finite sampler', finite


def run(digits, folder):
    mmengine.runner.loops.time = SimpleNamespace(sleep=lambda seconds: None)  # it waits 2 s at the end of a pass
    counts = {}
    for name, cfg in cases(digits, folder):
        prepare_cpu_launch(cfg)
        train(cfg, count := Count())
        hook = count.hook
        counts[name] = dict(
            period=hook.period, alphas=count.alphas, refreshes=count.refreshes, exchanges=count.exchanges
        )
        if hook.source == 'snapshot':
            buffers = [b.double().sum().item() for name, b in hook.past.model.named_buffers() if 'running' in name]
            counts[name]['buffers'] = buffers
    return counts


def process(rank, processes, port, digits, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    prepare_cpu_launch(Config(dict(launcher='pytorch')))
    (folder / f'{processes}-{rank}.json').write_text(json.dumps(run(digits, folder)))
    leave_group()


if __name__ == '__main__':
    for module in ('mmpretrain.models', 'mmpretrain.evaluation', 'matplotlib.pyplot'):
        import_module(module)  # which mmengine would import in each process
    gc.collect()
    gc.freeze()  # mmengine calls gc.collect() for every data set
    # Forked, so that the toolkits are imported once. (Not where training has begun: autograd has threads then.)
    for processes in (1, 2, 4):
        port = free_port()
        mp.start_processes(
            process, (processes, port, sys.argv[1], Path(sys.argv[2])), nprocs=processes, start_method='fork'
        )
