"""What a training step costs with each method, against the plain step, in real mmengine runners."""

from typing import Dict, List, NamedTuple, Optional

import numpy as np
from costs import Table
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmpretrain.registry import DATASETS

import selfkd_mmpretrain  # noqa: F401  (registers what is measured)
from suites.mmengine import compare_configs, training_config

__all__ = ['distillation_suite', 'step_suite']

HOOKS: Dict[str, Optional[dict]] = {
    'plain': None,
    'PS-KD, bank': dict(type='selfkd_mmpretrain.PSKDHook'),
    'PS-KD, bank, top-16': dict(type='selfkd_mmpretrain.PSKDHook', top_k=16),
    'PS-KD, snapshot': dict(type='selfkd_mmpretrain.PSKDHook', teacher='snapshot'),
}


class Shape(NamedTuple):
    """Of a training step."""

    network: str
    backbone: dict
    channels: int
    batch: int
    pixels: int
    classes: int
    amp: bool = False
    batches: int = 4
    repeats: int = 16


PREACT = dict(type='selfkd_mmpretrain.PreActResNet', depth=18)
RESNET50 = dict(type='ResNet', depth=50, out_indices=(3,))
SHAPES = dict(
    small=[Shape('ResNet-18', dict(type='ResNet_CIFAR', depth=18, out_indices=(3,)), 512, 32, 32, 100)],
    full=[
        Shape('PreAct ResNet-18', PREACT, 512, 128, 32, 100),
        Shape('ResNet-50', RESNET50, 2048, 128, 224, 1000, amp=True),
    ],
)
SHAPES['tiny'] = [
    shape._replace(
        backbone=dict(shape.backbone, base_channels=8),
        channels=shape.channels // 8,
        batch=2,
        pixels=32,
        classes=20,
        batches=1,
        repeats=1,
    )
    for shape in SHAPES['full']
]


@DATASETS.register_module()
class RandomImages(BaseDataset):
    """Random square images."""

    def __init__(self, samples: int, pixels: int, classes: int, **kwargs):
        self.samples, self.pixels, self.classes = samples, pixels, classes
        super().__init__(**kwargs)

    def load_data_list(self):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (self.samples, self.pixels, self.pixels, 3), dtype=np.uint8)
        return [dict(img=image, gt_label=int(rng.integers(self.classes))) for image in images]


def make_config(shape: Shape, hook: Optional[dict] = None) -> Config:
    head = dict(type='LinearClsHead', num_classes=shape.classes, in_channels=shape.channels)
    neck = dict(type='GlobalAveragePooling')
    dataset = dict(
        type='RandomImages',
        samples=shape.batches * shape.batch,
        pixels=shape.pixels,
        classes=shape.classes,
        pipeline=[dict(type='PackInputs')],
    )
    return training_config(
        'mmpretrain',
        dict(type='ImageClassifier', backbone=shape.backbone, neck=neck, head=head),
        dataset,
        shape.batch,
        lr=0.1,
        hook=hook,
        amp=shape.amp,
    )


def _title(shape: Shape) -> str:
    return (
        f'a whole {shape.network} training step, batch {shape.batch}, {shape.pixels} x {shape.pixels} images, '
        f'{shape.classes} classes{", mixed precision" if shape.amp else ""}.'
    )


def step_suite(size: str = 'small') -> List[Table]:
    """PS-KD in MMPretrain."""
    tables = []
    for shape in SHAPES[size]:
        configs = {name: make_config(shape, hook) for name, hook in HOOKS.items()}
        tables.append(Table(f'PS-KD: {_title(shape)}', compare_configs(configs, shape.repeats)))
    return tables


def distillation_suite(size: str = 'small') -> List[Table]:
    """CS-KD and FRSKD in MMPretrain."""
    tables = []
    for shape in SHAPES[size]:
        cskd, frskd = make_config(shape, dict(type='selfkd_mmpretrain.CSKDHook')), make_config(shape)
        frskd.model.type = 'selfkd_mmpretrain.FRSKDImageClassifier'
        configs = {'plain': make_config(shape), 'CS-KD': cskd, 'FRSKD': frskd}
        tables.append(Table(f'CS-KD and FRSKD: {_title(shape)}', compare_configs(configs, shape.repeats)))
    return tables
