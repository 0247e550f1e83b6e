"""Which of MMDetection's heads the methods support, and where the hooks tap them."""

from typing import Any, List, Optional, Sequence, Tuple, Union

from mmdet.models.dense_heads import ATSSHead, FCOSHead, RetinaHead
from mmdet.models.losses import CrossEntropyLoss, FocalLoss
from mmdet.models.roi_heads import (
    BBoxHead,
    CascadeRoIHead,
    ConvFCBBoxHead,
    FCNMaskHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
    StandardRoIHead,
)
from mmdet.registry import MODELS
from torch import nn

__all__ = [
    'check_box_heads',
    'check_region_heads',
    'check_region_loss',
    'check_replaced_head',
    'check_roi_head',
    'has_focal_loss',
    'per_stage',
    'region_heads',
    'registered',
    'stage_of',
]

# Exactly these: subclasses choose positives by looking at predictions, or compute other losses.
DENSE_HEADS = (RetinaHead, FCOSHead, ATSSHead)

# What a config with StandardRoIHead has; with CascadeRoIHead also the last two. In train_cfg.rcnn, and as parts' types:
OPTIONS: Tuple[str, ...] = ('bbox_roi_extractor', 'bbox_head', 'mask_roi_extractor', 'mask_head', 'shared_head')
OPTIONS += ('train_cfg', 'test_cfg', 'init_cfg', 'num_stages', 'stage_loss_weights')
TRAIN_OPTIONS = ('assigner', 'sampler', 'pos_weight', 'debug', 'mask_size', 'mask_thr_binary')
BOX_HEADS = (BBoxHead, ConvFCBBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead)
MASK_HEADS = (FCNMaskHead,)
# Whose the others are, where a message can say it.
OWNERS = {
    'reg_roi_scale_factor': 'DoubleHeadRoIHead',
    'dynamic_rcnn': 'DynamicRoIHead',
    'grid_head': 'GridRoIHead',
    'glbctx_head': 'SCNetRoIHead',
    'interleaved': 'HybridTaskCascadeRoIHead',
    'HTCMaskHead': 'HybridTaskCascadeRoIHead',
    'mask_iou_head': 'MaskScoringRoIHead',
    'MultiInstanceBBoxHead': 'MultiInstanceRoIHead',
    'isr': 'PISARoIHead',
    'carl': 'PISARoIHead',
    'ScoreHLRSampler': 'PISARoIHead',
    'point_head': 'PointRendRoIHead',
    'proposal_feature_channel': 'SparseRoIHead',
    'DIIHead': 'SparseRoIHead',
    'num_branch': 'TridentRoIHead',
}


def per_stage(value) -> list:
    """What a RoI head has for each stage, also where there is one stage only and no list."""
    return list(value) if isinstance(value, (list, tuple, nn.ModuleList)) else [value]


def region_heads(model: nn.Module) -> List[nn.Module]:
    """The box heads of a two-stage detector, one per stage."""
    return per_stage(model.roi_head.bbox_head)


def stage_of(model: nn.Module, loss_cls: nn.Module) -> Tuple[int, str]:
    """The stage that a loss module belongs to, and its prefix in the logs: mmdet's own."""
    heads = region_heads(model)
    stage = next(i for i, head in enumerate(heads) if head.loss_cls is loss_cls)
    return stage, f's{stage}.' if len(heads) > 1 else ''


def check_roi_head(hook: str, model: nn.Module) -> None:
    """Refuses a RoI head that does not classify each region once, as MMDetection's two do and those made from them."""
    roi_head = model.roi_head
    name = type(roi_head).__name__
    if not isinstance(roi_head, (StandardRoIHead, CascadeRoIHead)) or not roi_head.with_bbox:
        raise ValueError(
            f'{hook}: {type(model).__name__} with the RoI head {name} is not supported: it is no StandardRoIHead or '
            f'CascadeRoIHead with a bbox_head, nor derived from one; train it without {hook}'
        )
    if getattr(roi_head, 'num_instance', 1) > 1:
        raise ValueError(
            f'{hook}: {name} classifies each region {roi_head.num_instance} times (CrowdDet), and trains whichever '
            'order of the answers fits the labels best: which one belongs to which prediction is not known. Train it '
            f'without {hook}'
        )


def check_region_heads(hook: str, model: nn.Module) -> None:
    """Refuses what is no two-stage detector with a softmax over the classes of its regions."""
    roi_head: Any = getattr(model, 'roi_head', None)
    if roi_head is None:
        raise ValueError(
            f'{hook}: {type(model).__name__} has no RoI head, and {hook} compares the classes of regions: take a '
            f'two-stage detector (Faster, Mask, Cascade R-CNN), or train it without {hook}'
        )
    check_roi_head(hook, model)
    if getattr(roi_head, 'num_branch', 1) > 1:
        raise ValueError(
            f'{hook}: {type(roi_head).__name__} reads each image {roi_head.num_branch} times (TridentNet), so that an '
            f'object would be its own partner; train it without {hook}'
        )
    for head in region_heads(model):
        check_region_loss(hook, head)


def registered(kind: Union[str, type]) -> Optional[type]:
    """The class that a config means by a type, where MMDetection's registry or that of the default scope has it."""
    with MODELS.switch_scope_and_registry(None) as registry:
        return kind if isinstance(kind, type) else registry.get(kind)


def _foreign(options: dict, part: str, known: Sequence[type]) -> List[Tuple[str, str]]:
    """Heads in a RoI head's options that are not of a known type: the setting and the type's name."""
    types = [head['type'] for head in per_stage(options.get(part)) if head]
    names = [getattr(registered(kind), '__name__', kind) for kind in types if registered(kind) not in known]
    return [(f'model.roi_head.{part}.type={name}', name) for name in names]


def check_replaced_head(user: str, kind: type, options: dict) -> None:
    """Refuses a RoI head's options that are not those of the plain kind that ``user`` would put in its place.

    Which type the config had cannot be seen any more: the option that switches ``user`` on took its place. But each of
    MMDetection's other RoI heads has an option, a box head, a mask head or a sampler that it cannot do without.

    Args:
        kind: ``StandardRoIHead`` or ``CascadeRoIHead``.
        options: the RoI head's, as MMDetection hands them over, ``train_cfg`` (``model.train_cfg.rcnn``) among them.
    """
    found = [(f'model.roi_head.{key}', key) for key in options if key not in OPTIONS]
    found += [*_foreign(options, 'bbox_head', BOX_HEADS), *_foreign(options, 'mask_head', MASK_HEADS)]
    for train_cfg in per_stage(options.get('train_cfg') or {}):
        found += [(f'model.train_cfg.rcnn.{key}', key) for key in train_cfg if key not in TRAIN_OPTIONS]
        sampler = train_cfg.get('sampler', {}).get('type')
        if sampler in OWNERS:
            found.append((f'model.train_cfg.rcnn.sampler.type={sampler}', sampler))
    if found:
        owner = next((f' of {OWNERS[name]}' for _, name in found if name in OWNERS), '')
        raise ValueError(
            f'{user}: takes the place of a StandardRoIHead or CascadeRoIHead as MMDetection configures them, but this '
            f'config has {", ".join(dict.fromkeys(setting for setting, _ in found))}{owner}, which would be lost in '
            f'{kind.__name__}: where the config had a RoI head of your own, name it in model.roi_head.base_type; '
            f'otherwise leave model.roi_head.type as it is, and train this detector without {user}'
        )


def check_box_heads(user: str, options: dict) -> None:
    """Refuses box heads that the self-teacher may have no classifier like."""
    for setting, _ in _foreign(options, 'bbox_head', BOX_HEADS):
        names = ', '.join(kind.__name__ for kind in BOX_HEADS)
        raise ValueError(
            f"{user}: the self-teacher has a box head like the detector's, which can be one of {names}, got {setting}: "
            f'leave model.roi_head.type as it is, and train this detector without {user}'
        )


def check_region_loss(user: str, head: nn.Module) -> None:
    """Refuses a box head whose classification is no softmax."""
    loss = head.loss_cls
    if type(loss) is not CrossEntropyLoss or loss.use_sigmoid or loss.use_mask:
        raise ValueError(
            f'{user}: {type(head).__name__} classifies regions with {type(loss).__name__}, but distillation is between '
            'softmax predictions: use loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False)'
        )


def has_focal_loss(model: nn.Module) -> bool:
    """Whether a one-stage detector matches anchors and labels without looking at predictions, and trains them with the
    focal loss of logits."""
    head = getattr(model, 'bbox_head', None)
    loss: Any = getattr(head, 'loss_cls', None)
    return type(head) in DENSE_HEADS and type(loss) is FocalLoss and not loss.activated
