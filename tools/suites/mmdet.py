"""What a training step costs with each method, against the plain step, in real mmengine runners."""

from typing import List, NamedTuple

import numpy as np
import torch
from costs import Table
from mmdet.registry import DATASETS
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.hub import get_config

import selfkd_mmdet  # noqa: F401  (registers what is measured)
from suites.mmengine import compare_configs, training_config

__all__ = ['RandomDetections', 'make_config', 'step_suite']


class Shape(NamedTuple):
    """Of a training step."""

    depth: int
    batch: int
    height: int
    width: int
    regions: int = 512
    batches: int = 4
    repeats: int = 32


FULL = Shape(50, 2, 800, 1333)
SHAPES = dict(
    tiny=FULL._replace(depth=18, batch=1, height=64, width=96, regions=16, batches=1, repeats=1),
    small=Shape(18, 2, 128, 128),
    full=FULL,
)


@DATASETS.register_module()
class RandomDetections(BaseDataset):
    """Random images with three boxes of 20 classes."""

    def __init__(self, samples: int, height: int, width: int, **kwargs):
        self.samples, self.height, self.width = samples, height, width
        super().__init__(**kwargs)

    def load_data_list(self):
        rng = np.random.default_rng(0)
        scale = np.array([self.width, self.height])
        scenes = []
        for _ in range(self.samples):
            corner, size = scale * rng.uniform(0, 0.5, (3, 2)), scale * rng.uniform(0.2, 0.5, (3, 2))
            scenes.append(
                dict(
                    img=rng.integers(0, 256, (self.height, self.width, 3), dtype=np.uint8),
                    img_shape=(self.height, self.width),
                    gt_bboxes=HorizontalBoxes(torch.tensor(np.hstack([corner, corner + size])).float()),
                    gt_bboxes_labels=rng.integers(0, 20, 3),
                    gt_ignore_flags=np.zeros(3, dtype=bool),
                )
            )
        return scenes


def make_config(shape: Shape, base: str, hook: str = '', **roi_head) -> Config:
    """MMDetection's own PASCAL VOC config, with the shape's images and ResNet."""
    model = get_config(f'mmdet::pascal_voc/{base}_r50_fpn_1x_voc0712.py').model
    model.backbone.update(depth=shape.depth, init_cfg=None)
    if shape.depth < 50:
        model.neck.in_channels = [64, 128, 256, 512]
    if base == 'faster-rcnn':
        model.train_cfg.rcnn.sampler.num = shape.regions
    if roi_head:
        model.roi_head.update(roi_head)
    dataset = dict(
        type='RandomDetections',
        samples=shape.batches * shape.batch,
        height=shape.height,
        width=shape.width,
        pipeline=[dict(type='PackDetInputs', meta_keys=('img_shape',))],
    )
    # Nothing is learnt: batch norms in evaluation mode do not normalise random weights, and a step would diverge.
    return training_config('mmdet', model, dataset, shape.batch, lr=0.0, hook=dict(type=hook) if hook else None)


def step_suite(size: str = 'small') -> List[Table]:
    """Faster R-CNN and RetinaNet in MMDetection."""
    shape = SHAPES[size]
    detectors = {
        'Faster R-CNN': {
            'Faster R-CNN': make_config(shape, 'faster-rcnn'),
            'PS-KD': make_config(shape, 'faster-rcnn', 'selfkd_mmdet.PSKDHook'),
            'CS-KD': make_config(shape, 'faster-rcnn', 'selfkd_mmdet.CSKDHook'),
            'FRSKD': make_config(shape, 'faster-rcnn', type='selfkd_mmdet.FRSKDRoIHead'),
        },
        'RetinaNet': {
            'RetinaNet': make_config(shape, 'retinanet'),
            'RetinaNet, PS-KD': make_config(shape, 'retinanet', 'selfkd_mmdet.PSKDHook'),
        },
    }
    tables = []
    for detector, configs in detectors.items():
        title = (
            f'A whole training step of {detector}, ResNet-{shape.depth} FPN, batch {shape.batch}, '
            f'{shape.height} x {shape.width} pixels.'
        )
        tables.append(Table(title, compare_configs(configs, shape.repeats)))
    return tables
