"""The settings of self-distillation in Detectron2's (yacs) configs, and the hooks that they ask for."""

from typing import List

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase

from .hooks import CSKDHook, PSKDHook

__all__ = ['add_selfkd_config', 'selfkd_hooks']


def add_selfkd_config(cfg: CfgNode) -> None:
    """Adds the node ``SELFKD``, everything off. Call it before ``cfg.merge_from_file``."""
    cfg.SELFKD = CfgNode()

    cfg.SELFKD.PSKD = CfgNode()
    cfg.SELFKD.PSKD.ENABLED = False
    cfg.SELFKD.PSKD.ALPHA = 0.8  # final share of the past prediction, in [0, 1]
    cfg.SELFKD.PSKD.INTERVAL = None  # iterations between two refreshes of the past copy; None: a pass over the data
    cfg.SELFKD.PSKD.BACKGROUND = True  # False leaves the label of background regions hard

    cfg.SELFKD.CSKD = CfgNode()
    cfg.SELFKD.CSKD.ENABLED = False
    cfg.SELFKD.CSKD.WEIGHT = 1.0  # of the KL
    cfg.SELFKD.CSKD.TEMPERATURE = 4.0

    cfg.SELFKD.FRSKD = CfgNode()  # on with MODEL.ROI_HEADS.NAME FRSKDROIHeads or FRSKDCascadeROIHeads
    cfg.SELFKD.FRSKD.ALPHA = 0.5  # weight of the KL from the self-teacher's prediction
    cfg.SELFKD.FRSKD.BETA = 1.0  # weight of the attention transfer; 0 for soft labels only
    cfg.SELFKD.FRSKD.TEMPERATURE = 1.0
    cfg.SELFKD.FRSKD.DEPTH = 1  # separable convolutions per fusion in the self-teacher
    cfg.SELFKD.FRSKD.REPEATS = 1  # passes of the self-teacher


def selfkd_hooks(cfg: CfgNode) -> List[HookBase]:
    """The hooks that ``cfg.SELFKD`` asks for; none by default. Register them before a checkpoint is resumed.

    Raises:
        ValueError: a setting out of range, or another number of classes than that of the training set.
    """
    pskd, cskd = cfg.SELFKD.PSKD, cfg.SELFKD.CSKD
    hooks = []
    if pskd.ENABLED:
        hooks.append(PSKDHook(pskd.ALPHA, pskd.INTERVAL, pskd.BACKGROUND))
    if cskd.ENABLED:
        hooks.append(CSKDHook(cskd.WEIGHT, cskd.TEMPERATURE))
    frskd = cfg.MODEL.ROI_HEADS.NAME in ('FRSKDROIHeads', 'FRSKDCascadeROIHeads')
    if frskd and cfg.MODEL.META_ARCHITECTURE != 'GeneralizedRCNN':
        raise ValueError(
            f'MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME}, but {cfg.MODEL.META_ARCHITECTURE} has no ROI heads: '
            f'FRSKD needs MODEL.META_ARCHITECTURE GeneralizedRCNN'
        )
    if hooks or frskd:
        _check_classes(cfg)
    return hooks


def _check_classes(cfg: CfgNode) -> None:
    dense = cfg.MODEL.META_ARCHITECTURE == 'RetinaNet'
    key, node = ('RETINANET', cfg.MODEL.RETINANET) if dense else ('ROI_HEADS', cfg.MODEL.ROI_HEADS)
    for name in cfg.DATASETS.TRAIN:
        names = MetadataCatalog.get(name).get('thing_classes')
        if names is not None and len(names) != node.NUM_CLASSES:
            raise ValueError(
                f'MODEL.{key}.NUM_CLASSES is {node.NUM_CLASSES}, but the training set {name} has {len(names)} classes: '
                f'set it to {len(names)}'
            )
