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
    """The model of one of MMDetection's own configs, for 20 classes, with the shape's images and ResNet."""
    model = get_config(f'mmdet::{base}.py').model
    model.backbone.init_cfg = model.data_preprocessor.batch_augments = None
    if model.backbone.type == 'ResNet':
        model.backbone.depth = shape.depth
        if shape.depth < 50:
            model.neck.in_channels = [channels // 4 for channels in model.neck.in_channels]
    if 'roi_head' in model:
        model.train_cfg.rcnn.sampler.num = shape.regions
    else:
        model.bbox_head.num_classes = 20
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
    """A two-stage detector, a one-stage one with the focal loss, another one, and a transformer, in MMDetection."""
    shape, tables = SHAPES[size], []
    of_rtmdet = 'l' if size == 'full' else 'tiny'
    bases = {
        'Faster R-CNN': 'pascal_voc/faster-rcnn_r50_fpn_1x_voc0712',
        'RetinaNet': 'pascal_voc/retinanet_r50_fpn_1x_voc0712',
        f'RTMDet-{of_rtmdet}': f'rtmdet/rtmdet_{of_rtmdet}_8xb32-300e_coco',
        'Deformable DETR': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco',
    }
    for detector, base in bases.items():
        two_stage = detector == 'Faster R-CNN'
        configs = {
            detector: make_config(shape, base),
            'PS-KD' if two_stage else f'{detector}, PS-KD': make_config(shape, base, 'selfkd_mmdet.PSKDHook'),
        }
        if two_stage:
            configs['CS-KD'] = make_config(shape, base, 'selfkd_mmdet.CSKDHook')
            configs['FRSKD'] = make_config(shape, base, type='selfkd_mmdet.FRSKDRoIHead')
        network = '' if detector.startswith('RTMDet') else f', ResNet-{shape.depth}{" FPN" * ("DETR" not in detector)}'
        title = (
            f'A whole training step of {detector}{network}, batch {shape.batch}, {shape.height} x {shape.width} pixels.'
        )
        tables.append(Table(title, compare_configs(configs, shape.repeats)))
    return tables
