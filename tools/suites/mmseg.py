"""What a training step costs with PS-KD and FRSKD, against the plain step, in real mmengine runners."""

from typing import Dict, List, NamedTuple, Optional

import numpy as np
from costs import Table
from mmengine.config import Config
from mmengine.hub import get_config
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

import selfkd_mmseg  # noqa: F401  (registers what is measured)
from suites.mmengine import compare_configs, training_config

__all__ = ['RandomScenes', 'make_config', 'step_suite']


class Shape(NamedTuple):
    """Of a training step: the network, and FRSKD's self-teachers for it."""

    network: str
    self_teachers: Dict[str, dict]
    batch: int
    pixels: int
    batches: int = 4
    repeats: int = 8


PSPNET = Shape('PSPNet, ResNet-50', {'FRSKD': dict(warmup=0.0)}, batch=4, pixels=512)
PAPERS = Shape(
    "the paper's model (EfficientNet-b0, three BiFPN layers)",
    {
        'FRSKD': dict(type='selfkd_mmseg.EfficientDetSelfTeacher', warmup=0.0),
        'FRSKD, warm-up': dict(type='selfkd_mmseg.EfficientDetSelfTeacher', warmup=1 - 1e-3),
        'FRSKD, the self-teacher for any network': dict(type='selfkd_mmseg.SelfTeacher', warmup=0.0),
    },
    batch=16,
    pixels=512,
)
SHAPES = dict(small=[PAPERS._replace(batch=8, pixels=128)], full=[PSPNET, PAPERS])
SHAPES['tiny'] = [shape._replace(batch=2, pixels=32, batches=1, repeats=1) for shape in SHAPES['full']]


@DATASETS.register_module()
class RandomScenes(BaseSegDataset):
    """Random images with masks of 21 classes."""

    def __init__(self, samples: int, pixels: int, **kwargs):
        self.samples, self.pixels = samples, pixels
        super().__init__(**kwargs)

    def load_data_list(self):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (self.samples, self.pixels, self.pixels, 3), dtype=np.uint8)
        patches = rng.integers(0, 21, (self.samples, self.pixels // 16, self.pixels // 16))
        masks = patches.repeat(16, 1).repeat(16, 2)
        return [dict(img=image, gt_seg_map=mask, seg_fields=[]) for image, mask in zip(images, masks)]


def make_config(shape: Shape, hook: Optional[dict] = None, self_teacher: Optional[dict] = None) -> Config:
    if shape.network == PSPNET.network:
        model = get_config('mmseg::pspnet/pspnet_r50-d8_4xb4-20k_voc12aug-512x512.py').model
        model.pretrained = None
        for part in (model.backbone, model.decode_head, model.auxiliary_head):
            part.norm_cfg = dict(type='BN')  # SyncBN without other processes
    else:
        model = dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor'),
            backbone=dict(type='selfkd_mmpretrain.efficientnet.EfficientNetLevels', arch='b0'),
            neck=dict(type='selfkd_mmseg.EfficientDetNeck', in_channels=[24, 40, 80, 320], width=64),
            decode_head=dict(type='selfkd_mmseg.ConvHead', in_channels=64, in_index=0, channels=256, num_classes=21),
        )
    model['data_preprocessor']['size'] = (shape.pixels, shape.pixels)
    if self_teacher:
        model.update(type='selfkd_mmseg.FRSKDEncoderDecoder', self_teacher=self_teacher)
    dataset = dict(
        type='RandomScenes',
        samples=shape.batches * shape.batch,
        pixels=shape.pixels,
        pipeline=[dict(type='PackSegInputs', meta_keys=())],
    )
    return training_config('mmseg', model, dataset, shape.batch, lr=0.01, hook=hook)


def step_suite(size: str = 'small') -> List[Table]:
    """PS-KD and FRSKD in MMSegmentation."""
    tables = []
    for shape in SHAPES[size]:
        configs = {'plain': make_config(shape), 'PS-KD': make_config(shape, dict(type='selfkd_mmseg.PSKDHook'))}
        configs.update((name, make_config(shape, None, options)) for name, options in shape.self_teachers.items())
        title = f'Segmentation: a step of {shape.network}, batch {shape.batch}, {shape.pixels} x {shape.pixels} pixels.'
        tables.append(Table(title, compare_configs(configs, shape.repeats)))
    return tables
