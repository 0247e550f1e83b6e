"""The settings of self-distillation in Detectron2's (yacs) configs, and what they ask for."""

from typing import Iterable, List

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase

from .frskd import options
from .hooks import CSKDHook, FRSKDCheck, PSKDHook

__all__ = ['SelfKDTrainer', 'add_selfkd_config', 'check_classes', 'selfkd_hooks', 'with_self_teacher']

ARCHITECTURES = ('GeneralizedRCNN', 'PanopticFPN')
SELF_TAUGHT = {'StandardROIHeads': 'FRSKDROIHeads', 'CascadeROIHeads': 'FRSKDCascadeROIHeads'}


def add_selfkd_config(cfg: CfgNode) -> None:
    """Adds the node ``SELFKD``, everything off. Call it before ``cfg.merge_from_file``."""
    cfg.SELFKD = CfgNode()

    # None stands for the default of the hook or head: with 0.8 here yacs would refuse 0 and 1, which are no floats.
    cfg.SELFKD.PSKD = CfgNode()
    cfg.SELFKD.PSKD.ENABLED = False
    cfg.SELFKD.PSKD.ALPHA = None  # 0.8: final weight of the past's term, in [0, 1]
    cfg.SELFKD.PSKD.INTERVAL = None  # iterations between two refreshes of the past copy: a pass over the data
    cfg.SELFKD.PSKD.KEEP_HARD = True  # False weighs the label's term by 1 - alpha, as the paper does in classification
    cfg.SELFKD.PSKD.BACKGROUND = True  # False leaves the label of background regions hard
    cfg.SELFKD.PSKD.TEACHER_MODE = 'train'  # or 'eval': the mode that the past copy predicts in

    cfg.SELFKD.CSKD = CfgNode()
    cfg.SELFKD.CSKD.ENABLED = False
    cfg.SELFKD.CSKD.WEIGHT = None  # 1.0: of the KL
    cfg.SELFKD.CSKD.TEMPERATURE = None  # 4.0

    cfg.SELFKD.FRSKD = CfgNode()
    cfg.SELFKD.FRSKD.ENABLED = False
    cfg.SELFKD.FRSKD.ALPHA = None  # 0.5: weight of the KL from the self-teacher's prediction
    cfg.SELFKD.FRSKD.BETA = None  # 1.0: weight of the attention transfer; 0 for soft labels only
    cfg.SELFKD.FRSKD.TEMPERATURE = None  # 1.0
    cfg.SELFKD.FRSKD.DEPTH = None  # 1: separable convolutions per fusion in the self-teacher
    cfg.SELFKD.FRSKD.REPEATS = None  # 1: passes of the self-teacher


def selfkd_hooks(cfg: CfgNode) -> List[HookBase]:
    """The hooks that ``cfg.SELFKD`` asks for; none by default. Register them before a checkpoint is resumed.

    Raises:
        ValueError: a setting out of range, or another number of classes than that of the training set.
    """
    selfkd, hooks = cfg.SELFKD, []
    if selfkd.PSKD.ENABLED:
        hooks.append(PSKDHook(**options(selfkd.PSKD)))
    if selfkd.CSKD.ENABLED:
        hooks.append(CSKDHook(**options(selfkd.CSKD)))
    if selfkd.FRSKD.ENABLED:
        hooks.append(FRSKDCheck())
    if hooks:
        node = 'RETINANET' if cfg.MODEL.META_ARCHITECTURE == 'RetinaNet' else 'ROI_HEADS'
        check_classes(f'MODEL.{node}.NUM_CLASSES', cfg.MODEL[node].NUM_CLASSES, cfg.DATASETS.TRAIN)
    return hooks


def check_classes(setting: str, num_classes: int, datasets: Iterable[str]) -> None:
    """Refuses a detector with another number of classes than a training set.

    Args:
        setting: what the message calls the number.
        num_classes: of the detector.
        datasets: names in Detectron2's catalog.

    Raises:
        ValueError: names the setting and the data set.
    """
    for name in datasets:
        names = MetadataCatalog.get(name).get('thing_classes')
        if names is not None and len(names) != num_classes:
            raise ValueError(
                f'{setting} is {num_classes}, but the training set {name} has {len(names)} classes: '
                f'set it to {len(names)}'
            )


def with_self_teacher(cfg: CfgNode) -> CfgNode:
    """The config to build the model from: FRSKD's ROI heads in place of its own where ``SELFKD.FRSKD.ENABLED``.

    Raises:
        ValueError: the detector has none of the ROI heads that FRSKD's equal.
    """
    if not cfg.SELFKD.FRSKD.ENABLED:
        return cfg
    architecture, heads = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME
    if heads in SELF_TAUGHT.values():
        return cfg
    if architecture not in ARCHITECTURES or heads not in SELF_TAUGHT:
        known = architecture in ARCHITECTURES
        found = f'MODEL.ROI_HEADS.NAME {heads}' if known else f'MODEL.META_ARCHITECTURE {architecture}'
        raise ValueError(
            f'SELFKD.FRSKD.ENABLED does not work with {found}: the self-teacher refines the feature pyramid of '
            f'{" or ".join(SELF_TAUGHT)} in {" or ".join(ARCHITECTURES)}, and subclasses may work otherwise. Take such '
            'a config, or set it to False (SELFKD.PSKD works with Res5ROIHeads, RetinaNet and FCOS, too)'
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NAME = SELF_TAUGHT[heads]
    return cfg


class SelfKDTrainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with what ``cfg.SELFKD`` asks for; derive your own from it as from that one."""

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        self.register_hooks(selfkd_hooks(self.cfg))  # not in build_hooks, which others override without calling super()

    @classmethod
    def build_model(cls, cfg: CfgNode):
        return super().build_model(with_self_teacher(cfg))
