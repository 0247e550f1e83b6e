"""The settings of self-distillation in Detectron2's (yacs) configs, and what they ask for."""

import functools
import logging
from typing import Iterable, List

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase

from .frskd import SelfTaught, options
from .hooks import CSKDHook, FRSKDHook, PSKDHook, StepHook

__all__ = ['SelfKDTrainer', 'add_selfkd_config', 'check_classes', 'selfkd_hooks', 'with_self_teacher']

ARCHITECTURES = ('GeneralizedRCNN', 'PanopticFPN')
METHODS = {'PSKD': PSKDHook, 'CSKD': CSKDHook, 'FRSKD': FRSKDHook}
SELF_TAUGHT = {'StandardROIHeads': 'FRSKDROIHeads', 'CascadeROIHeads': 'FRSKDCascadeROIHeads'}


def add_selfkd_config(cfg: CfgNode) -> None:
    """Adds the node ``SELFKD``, everything off. Call it before ``cfg.merge_from_file``."""
    cfg.SELFKD = CfgNode()

    # None stands for the default of the hook or head: with 0.8 here yacs would refuse 0 and 1, which are no floats.
    cfg.SELFKD.PSKD = CfgNode()
    cfg.SELFKD.PSKD.ENABLED = False
    cfg.SELFKD.PSKD.ALPHA = None  # 0.8: final weight of the past's term, in [0, 1]
    cfg.SELFKD.PSKD.TEACHER = 'auto'  # what the past copy is: 'snapshot' (which 'auto' takes) or 'ema'
    cfg.SELFKD.PSKD.TEACHER_MODE = 'train'  # or 'eval': the mode that the past copy predicts in
    cfg.SELFKD.PSKD.INTERVAL = None  # iterations of a period, between two snapshots: a pass over the data
    cfg.SELFKD.PSKD.EMA_DECAY = None  # 0.999: of 'ema', in [0, 1)
    cfg.SELFKD.PSKD.KEEP_HARD = True  # False weighs the label's term by 1 - alpha, as the paper does in classification
    cfg.SELFKD.PSKD.BACKGROUND = True  # False leaves the label of background regions hard

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
    methods = _asked_for(cfg)
    # FRSKD's settings are its ROI heads'.
    hooks = [METHODS[name](**({} if name == 'FRSKD' else options(cfg.SELFKD[name]))) for name in methods]
    # Other architectures have their number elsewhere; PSKDHook and CSKDHook refuse them by name.
    node = 'RETINANET' if cfg.MODEL.META_ARCHITECTURE == 'RetinaNet' else 'ROI_HEADS'
    if methods and (node == 'RETINANET' or cfg.MODEL.META_ARCHITECTURE in ARCHITECTURES):
        check_classes(f'MODEL.{node}.NUM_CLASSES', cfg.MODEL[node].NUM_CLASSES, cfg.DATASETS.TRAIN)
    return hooks


def _asked_for(cfg: object) -> List[str]:
    """Names of the methods that a config switches on."""
    selfkd = cfg.get('SELFKD') if isinstance(cfg, CfgNode) else None
    return [name for name in METHODS if selfkd and selfkd[name].ENABLED]


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
    """Detectron2's ``DefaultTrainer`` with what ``cfg.SELFKD`` asks for; derive your own from it as from that one.

    A subclass may have an ``__init__`` of its own that calls ``TrainerBase.__init__`` instead of this one's.
    """

    def register_hooks(self, hooks: List[HookBase]) -> None:
        """As ``TrainerBase``'s. Those of ``cfg.SELFKD`` come with the first, which are ``build_hooks()``'s.

        So neither that method nor ``__init__`` need be ours.
        """
        first = not self._hooks and hasattr(self, 'cfg')
        super().register_hooks([*hooks, *(selfkd_hooks(self.cfg) if first else ())])

    @classmethod
    def build_model(cls, cfg: CfgNode):
        return super().build_model(with_self_teacher(cfg))


def check_trainer(trainer: TrainerBase) -> None:
    """Refuses a trainer whose config asks for methods that it has no hooks of, as it would train plainly.

    Where a trainer has no config to look at, a warning says that nothing of ours is at work.

    Raises:
        ValueError: names the setting and the trainer.
    """
    cfg, hooks = getattr(trainer, 'cfg', None), trainer._hooks
    missing = [name for name in _asked_for(cfg) if not any(isinstance(hook, METHODS[name]) for hook in hooks)]
    if missing:
        settings = ', '.join(f'SELFKD.{name}.ENABLED' for name in missing)
        raise ValueError(
            f'{settings} is True, but {type(trainer).__name__} has not registered {METHODS[missing[0]].__name__}: it '
            'would train plainly. Derive it from selfkd_detectron2.SelfKDTrainer instead of DefaultTrainer, or build '
            'the model from with_self_teacher(cfg) and register selfkd_hooks(cfg) before a checkpoint is resumed'
        )
    modules = trainer.model.modules() if hasattr(trainer, 'model') else ()
    if cfg is None and not any(isinstance(part, (StepHook, SelfTaught)) for part in (*hooks, *modules)):
        logging.getLogger('detectron2.selfkd').warning(
            "selfkd_detectron2 was imported, but this trainer has none of its hooks: it trains plainly. (Detectron2's "
            'tools/lazyconfig_train_net.py does not read train.selfkd; selfkd train-detectron2 does)'
        )


def _checked(before_train):
    @functools.wraps(before_train)
    def checked(trainer: TrainerBase) -> None:
        check_trainer(trainer)
        before_train(trainer)

    return checked


# Detectron2's own trainers and scripts read none of our settings, and say nothing: this is the one place that all pass.
TrainerBase.before_train = _checked(TrainerBase.before_train)
