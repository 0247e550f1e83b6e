"""What a training step costs with PS-KD and FRSKD, against the plain step, in real mmengine runners."""

import tempfile
from typing import List, Optional

import numpy as np
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from selfkd.benchmark import Cost, compare
from selfkd_mmengine.benchmark import step_of

__all__ = ['RandomScenes', 'make_step', 'step_suite']

MODEL = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(128, 128)),
    backbone=dict(type='selfkd_mmseg.efficientnet.EfficientNetLevels', arch='b0'),
    neck=dict(type='selfkd_mmseg.EfficientDetNeck', in_channels=[24, 40, 80, 320], width=64),
    decode_head=dict(type='selfkd_mmseg.ConvHead', in_channels=64, in_index=0, channels=256, num_classes=21),
)
FRSKD = dict(type='selfkd_mmseg.FRSKDEncoderDecoder')


@DATASETS.register_module()
class RandomScenes(BaseSegDataset):
    """Random 128 x 128 images with masks of 21 classes."""

    def load_data_list(self):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (32, 128, 128, 3), dtype=np.uint8)
        masks = rng.integers(0, 21, (32, 8, 8)).repeat(16, 1).repeat(16, 2)
        return [dict(img=image, gt_seg_map=mask, seg_fields=[]) for image, mask in zip(images, masks)]


def make_step(model: dict, work_dir: str, hook: Optional[dict] = None):
    """One training step of a run in which the past copy exists, or the distillation terms act."""
    cfg = Config(
        dict(
            default_scope='mmseg',
            model=model,
            train_dataloader=dict(
                batch_size=8,
                dataset=dict(type='RandomScenes', pipeline=[dict(type='PackSegInputs', meta_keys=())]),
                sampler=dict(type='DefaultSampler', shuffle=True),
            ),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
            train_cfg=dict(by_epoch=True, max_epochs=10**4),
            custom_hooks=[hook] if hook else [],
            work_dir=work_dir,
            experiment_name=f'benchmark-{work_dir}',
            log_level='ERROR',
        )
    )
    return step_of(Runner.from_cfg(cfg))


def step_suite() -> List[Cost]:
    """Segmentation: a step of the paper's model (EfficientNet-b0, three BiFPN layers), batch 8, 128 x 128 pixels."""

    def frskd(teacher: str, warmup: float) -> dict:
        return {**MODEL, **FRSKD, 'self_teacher': dict(type=f'selfkd_mmseg.{teacher}', warmup=warmup)}

    with tempfile.TemporaryDirectory() as folder:
        return compare(
            {
                'plain': make_step(MODEL, f'{folder}/plain'),
                'PS-KD': make_step(MODEL, f'{folder}/pskd', dict(type='selfkd_mmseg.PSKDHook')),
                'FRSKD': make_step(frskd('EfficientDetSelfTeacher', 0.0), f'{folder}/frskd'),
                'FRSKD, warm-up': make_step(frskd('EfficientDetSelfTeacher', 1 - 1e-3), f'{folder}/warming'),
                'FRSKD, the self-teacher for any network': make_step(frskd('SelfTeacher', 0.0), f'{folder}/general'),
            },
            repeats=8,
        )
