"""What a training step costs with each method, against the plain step, in Detectron2's own trainer."""

import itertools
from typing import Callable, Dict, List

import torch
from detectron2 import model_zoo
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from selfkd.benchmark import Cost, compare

from .config import add_selfkd_config, selfkd_hooks, with_self_teacher

__all__ = ['make_step', 'step_suite']

BATCHES = 4
R18 = """
    MODEL.DEVICE cpu MODEL.BACKBONE.FREEZE_AT 0
    MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.NORM BN
    MODEL.ROI_HEADS.NUM_CLASSES 20 DATASETS.TRAIN () SOLVER.BASE_LR 0.0001
"""


class _Batches:
    """Two random 128 x 128 images with three boxes of 20 classes each, again and again."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.batches = [[_scene(generator) for _ in range(2)] for _ in range(BATCHES)]

    def __iter__(self):
        return itertools.cycle(self.batches)


def _scene(generator: torch.Generator) -> Dict[str, object]:
    corner, size = 64 * torch.rand(3, 2, generator=generator), 24 + 40 * torch.rand(3, 2, generator=generator)
    objects = Instances((128, 128))
    objects.gt_boxes = Boxes(torch.cat([corner, corner + size], 1))
    objects.gt_classes = torch.randint(20, (3,), generator=generator)
    return dict(image=torch.randint(256, (3, 128, 128), generator=generator, dtype=torch.uint8), instances=objects)


def make_step(options: str = '') -> Callable[[], None]:
    """A step of Detectron2's own Faster R-CNN config with a ResNet-18, batch 2, where past predictions exist."""
    cfg = model_zoo.get_config('COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml')
    add_selfkd_config(cfg)
    cfg.merge_from_list(f'{R18} {options}'.split())
    torch.manual_seed(0)  # the same weights for all: RoIAlign's cost depends on the regions that the RPN proposes
    model = build_model(with_self_teacher(cfg)).train()
    trainer = SimpleTrainer(model, _Batches(), build_optimizer(cfg, model))
    trainer.register_hooks(selfkd_hooks(cfg))
    trainer.iter, trainer.max_iter, trainer.storage = 0, 10**4, EventStorage(0)
    trainer.before_train()

    def step():
        with trainer.storage:
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        trainer.iter += 1

    for _ in range(BATCHES):
        step()
    return step


def step_suite() -> List[Cost]:
    """A whole training step of Detectron2's Faster R-CNN, ResNet-18 FPN, batch 2, 128 x 128 pixels."""
    return compare(
        {
            'Faster R-CNN': make_step(),
            'PS-KD': make_step(f'SELFKD.PSKD.ENABLED True SELFKD.PSKD.INTERVAL {BATCHES}'),
            'CS-KD': make_step('SELFKD.CSKD.ENABLED True'),
            'FRSKD': make_step('SELFKD.FRSKD.ENABLED True'),
        },
        repeats=32,
    )
