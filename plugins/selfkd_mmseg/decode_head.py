"""What both methods ask of a decode head."""

from typing import List

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import nn

__all__ = ['losses_of', 'plain_loss']


def plain_loss(head: nn.Module) -> bool:
    """Whether the head computes its loss as ``BaseDecodeHead`` does: each loss module once, on the head's logits.

    Heads with a ``loss_by_feat`` of their own call their losses on several outputs, or on masks.
    """
    return getattr(type(head), 'loss_by_feat', None) is BaseDecodeHead.loss_by_feat


def losses_of(head: nn.Module) -> List[nn.Module]:
    return list(head.loss_decode) if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
