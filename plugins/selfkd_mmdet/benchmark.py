"""What a training step costs with each method, against the plain step, in real mmengine runners."""

import tempfile
from typing import List

import numpy as np
import torch
from mmdet.registry import DATASETS
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.hub import get_config
from mmengine.runner import Runner

from selfkd.benchmark import Cost, compare
from selfkd_mmengine.benchmark import step_of

__all__ = ['RandomDetections', 'make_step', 'step_suite']


@DATASETS.register_module()
class RandomDetections(BaseDataset):
    """Random 128 x 128 images with three boxes of 20 classes."""

    def load_data_list(self):
        rng = np.random.default_rng(0)
        scenes = []
        for _ in range(8):
            corner, size = rng.uniform(0, 64, (3, 2)), rng.uniform(24, 64, (3, 2))
            scenes.append(
                dict(
                    img=rng.integers(0, 256, (128, 128, 3), dtype=np.uint8),
                    img_shape=(128, 128),
                    gt_bboxes=HorizontalBoxes(torch.tensor(np.hstack([corner, corner + size])).float()),
                    gt_bboxes_labels=rng.integers(0, 20, 3),
                    gt_ignore_flags=np.zeros(3, dtype=bool),
                )
            )
        return scenes


def make_step(base: str, work_dir: str, hook: str = '', **roi_head):
    """A step of MMDetection's own PASCAL VOC config with a ResNet-18, batch 2."""
    model = get_config(f'mmdet::pascal_voc/{base}_r50_fpn_1x_voc0712.py').model
    model.backbone.update(depth=18, init_cfg=None)
    model.neck.in_channels = [64, 128, 256, 512]
    if roi_head:
        model.roi_head.update(roi_head)
    cfg = Config(
        dict(
            default_scope='mmdet',
            model=model,
            train_dataloader=dict(
                batch_size=2,
                dataset=dict(
                    type='RandomDetections',
                    serialize_data=False,
                    pipeline=[dict(type='PackDetInputs', meta_keys=('img_shape',))],
                ),
                sampler=dict(type='DefaultSampler', shuffle=True),
            ),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.001, momentum=0.9)),
            train_cfg=dict(by_epoch=True, max_epochs=10**4),
            custom_hooks=[dict(type=hook)] if hook else [],
            # The same weights for all: RoIAlign's cost depends on the size of the regions that the RPN proposes.
            randomness=dict(seed=0),
            work_dir=work_dir,
            experiment_name=f'benchmark-{work_dir}',
            log_level='ERROR',
        )
    )
    return step_of(Runner.from_cfg(cfg))


def step_suite() -> List[Cost]:
    """A whole training step of Faster R-CNN and RetinaNet, ResNet-18 FPN, batch 2, 128 x 128 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        two_stage = compare(
            {
                'Faster R-CNN': make_step('faster-rcnn', f'{folder}/plain'),
                'PS-KD': make_step('faster-rcnn', f'{folder}/pskd', 'selfkd_mmdet.PSKDHook'),
                'CS-KD': make_step('faster-rcnn', f'{folder}/cskd', 'selfkd_mmdet.CSKDHook'),
                'FRSKD': make_step('faster-rcnn', f'{folder}/frskd', type='selfkd_mmdet.FRSKDRoIHead'),
            },
            repeats=32,
        )
        one_stage = compare(
            {
                'RetinaNet': make_step('retinanet', f'{folder}/retinanet'),
                'RetinaNet, PS-KD': make_step('retinanet', f'{folder}/retinanet-pskd', 'selfkd_mmdet.PSKDHook'),
            },
            repeats=8,
        )
    return [*two_stage, *one_stage]
