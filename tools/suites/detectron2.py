"""What a training step costs with each method, against the plain step, in Detectron2's own trainer."""

import itertools
from typing import Callable, Dict, List, NamedTuple

import torch
from costs import Table, compare, used_device
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from selfkd_detectron2.config import add_selfkd_config, selfkd_hooks, with_self_teacher

__all__ = ['make_config', 'make_step', 'step_suite']

BATCHES = 4
R18 = """
    MODEL.BACKBONE.FREEZE_AT 0
    MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.NORM BN
"""


class Shape(NamedTuple):
    """Of a training step: of the zoo's config with these options."""

    network: str
    options: str
    batch: int
    height: int
    width: int
    repeats: int = 32


FULL = Shape('ResNet-50', '', 2, 800, 1333)
SHAPES = dict(
    tiny=FULL._replace(batch=1, height=64, width=96, repeats=1),
    small=Shape('ResNet-18', R18, 2, 128, 128),
    full=FULL,
)


class _Batches:
    """A few random images with three boxes of 20 classes each, again and again."""

    def __init__(self, shape: Shape):
        generator = torch.Generator().manual_seed(0)
        self.batches = [[_scene(shape, generator) for _ in range(shape.batch)] for _ in range(BATCHES)]

    def __iter__(self):
        return itertools.cycle(self.batches)


def _scene(shape: Shape, generator: torch.Generator) -> Dict[str, object]:
    height, width = shape.height, shape.width
    scale = torch.tensor([width, height])
    corner = scale * 0.5 * torch.rand(3, 2, generator=generator)
    size = scale * (0.2 + 0.3 * torch.rand(3, 2, generator=generator))
    objects = Instances((height, width))
    objects.gt_boxes = Boxes(torch.cat([corner, corner + size], 1))
    objects.gt_classes = torch.randint(20, (3,), generator=generator)
    return dict(image=torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8), instances=objects)


def make_config(shape: Shape, options: str = '') -> CfgNode:
    """Detectron2's own Faster R-CNN config, with the shape's ResNet."""
    cfg = model_zoo.get_config('COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml')
    add_selfkd_config(cfg)
    # Nothing is learnt: frozen batch norms do not normalise random weights, and a step would diverge.
    common = f'MODEL.DEVICE {used_device()} MODEL.ROI_HEADS.NUM_CLASSES 20 DATASETS.TRAIN () SOLVER.BASE_LR 0.0'
    cfg.merge_from_list(f'{common} {shape.options} {options}'.split())
    return cfg


def make_step(cfg: CfgNode, shape: Shape) -> Callable[[], None]:
    """A training step, where past predictions exist."""
    torch.manual_seed(0)  # the same weights for all: RoIAlign's cost depends on the regions that the RPN proposes
    model = build_model(with_self_teacher(cfg)).train()
    trainer = SimpleTrainer(model, _Batches(shape), build_optimizer(cfg, model))
    trainer.register_hooks(selfkd_hooks(cfg))
    trainer.cfg, trainer.iter, trainer.max_iter, trainer.storage = cfg, 0, 10**4, EventStorage(0)
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


def step_suite(size: str = 'small') -> List[Table]:
    """Faster R-CNN in Detectron2."""
    shape = SHAPES[size]
    methods = {
        'Faster R-CNN': '',
        'PS-KD': f'SELFKD.PSKD.ENABLED True SELFKD.PSKD.INTERVAL {BATCHES}',
        'CS-KD': 'SELFKD.CSKD.ENABLED True',
        'FRSKD': 'SELFKD.FRSKD.ENABLED True',
    }
    steps = {name: make_step(make_config(shape, options), shape) for name, options in methods.items()}
    title = (
        f"A whole training step of Detectron2's Faster R-CNN, {shape.network} FPN, batch {shape.batch}, "
        f'{shape.height} x {shape.width} pixels.'
    )
    return [Table(title, compare(steps, repeats=shape.repeats))]
