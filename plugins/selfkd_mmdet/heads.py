"""Which of MMDetection's heads the hooks support, and where to tap them."""

from typing import List, Tuple

from mmdet.models.dense_heads import ATSSHead, FCOSHead, RetinaHead
from mmdet.models.losses import CrossEntropyLoss, FocalLoss
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from torch import nn

__all__ = ['check_dense_head', 'check_region_heads', 'check_region_loss', 'per_stage', 'region_heads', 'stage_of']

# Exactly these: subclasses choose positives by looking at predictions, or compute other losses.
DENSE_HEADS = (RetinaHead, FCOSHead, ATSSHead)


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


def check_region_heads(hook: str, model: nn.Module) -> None:
    """Refuses what is no two-stage detector with a softmax over the classes of its regions."""
    roi_head = getattr(model, 'roi_head', None)
    # Heads with a _bbox_forward of their own (HTC, SCNet, Double-Head) classify from more than the pyramid's regions.
    usual = (StandardRoIHead._bbox_forward, CascadeRoIHead._bbox_forward)
    if getattr(type(roi_head), '_bbox_forward', None) not in usual or not roi_head.with_bbox:
        raise ValueError(
            f'{hook}: {type(model).__name__} with the RoI head {type(roi_head).__name__} is not supported: it needs a '
            'two-stage detector with StandardRoIHead or CascadeRoIHead (Faster, Mask, Cascade R-CNN)'
        )
    for head in region_heads(model):
        check_region_loss(hook, head)


def check_region_loss(user: str, head: nn.Module) -> None:
    """Refuses a box head whose classification is no softmax."""
    loss = head.loss_cls
    if type(loss) is not CrossEntropyLoss or loss.use_sigmoid or loss.use_mask:
        raise ValueError(
            f'{user}: {type(head).__name__} classifies regions with {type(loss).__name__}, but distillation is '
            'between softmax predictions: use loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False)'
        )


def check_dense_head(hook: str, model: nn.Module) -> None:
    """Refuses one-stage detectors that are not known to match anchors and labels without looking at predictions."""
    head = model.bbox_head
    names = ', '.join(kind.__name__ for kind in DENSE_HEADS)
    if type(head) not in DENSE_HEADS:
        raise ValueError(
            f'{hook}: {type(model).__name__} with {type(head).__name__} is not supported: of the one-stage detectors '
            f'those with {names} are, whose labels do not depend on predictions'
        )
    loss = head.loss_cls
    if type(loss) is not FocalLoss or loss.activated:
        raise ValueError(
            f'{hook}: {type(head).__name__} classifies with {type(loss).__name__}, but the teacher enters beside the '
            'focal loss of logits: use loss_cls=dict(type="FocalLoss", use_sigmoid=True, activated=False)'
        )
