"""What a training step costs with each method, against the plain step, in real mmengine runners."""

import tempfile
from typing import Dict, List, Optional

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS

from selfkd.benchmark import Cost, compare
from selfkd_mmengine.benchmark import step_of

__all__ = ['distillation_suite', 'step_suite']

HOOKS: Dict[str, Optional[dict]] = {
    'plain': None,
    'PS-KD, bank': dict(type='selfkd_mmpretrain.PSKDHook'),
    'PS-KD, bank, top-16': dict(type='selfkd_mmpretrain.PSKDHook', top_k=16),
    'PS-KD, snapshot': dict(type='selfkd_mmpretrain.PSKDHook', teacher='snapshot'),
}


@DATASETS.register_module()
class RandomImages(BaseDataset):
    """Random 32 x 32 images of 100 classes."""

    def load_data_list(self):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (128, 32, 32, 3), dtype=np.uint8)
        return [dict(img=image, gt_label=int(rng.integers(100))) for image in images]


def make_step(hook: Optional[dict], work_dir: str, frskd: bool = False):
    """One training step, hooks included, of a run in its second epoch, where past predictions exist."""
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                backbone=dict(type='ResNet_CIFAR', depth=18, out_indices=(3,)),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=100, in_channels=512),
            ),
            train_dataloader=dict(
                batch_size=32,
                dataset=dict(type='RandomImages', pipeline=[dict(type='PackInputs')]),
                sampler=dict(type='DefaultSampler', shuffle=True),
            ),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
            train_cfg=dict(by_epoch=True, max_epochs=10),
            custom_hooks=[hook] if hook else [],
            work_dir=work_dir,
            experiment_name=f'benchmark-{work_dir}',
            log_level='ERROR',
        )
    )
    if frskd:
        cfg.model.type = 'selfkd_mmpretrain.FRSKDImageClassifier'
    return step_of(Runner.from_cfg(cfg))


def step_suite() -> List[Cost]:
    """A whole ResNet-18 training step, batch 32, 32 x 32 images, 100 classes."""
    with tempfile.TemporaryDirectory() as folder:
        return compare({name: make_step(hook, f'{folder}/{i}') for i, (name, hook) in enumerate(HOOKS.items())})


def distillation_suite() -> List[Cost]:
    """CS-KD and FRSKD: a whole ResNet-18 training step, batch 32, 32 x 32 images, 100 classes."""
    with tempfile.TemporaryDirectory() as folder:
        return compare(
            {
                'plain': make_step(None, f'{folder}/plain'),
                'CS-KD': make_step(dict(type='selfkd_mmpretrain.CSKDHook'), f'{folder}/cskd'),
                'FRSKD': make_step(None, f'{folder}/frskd', frskd=True),
            },
            repeats=12,
        )
