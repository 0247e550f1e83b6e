"""What the losses share: log-softmax, products in which 0 times infinity is 0, reductions."""

import math
from typing import Iterator, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import tracing, wide
from ..topk import NUMBERS_AT_ONCE


def log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=1, dtype=wide(logits.dtype))


def row_slices(logits: Tensor) -> Iterator[slice]:
    """Slices of the samples, a few at a time."""
    numbers = NUMBERS_AT_ONCE.get(logits.device.type, 2**25)
    samples = max(1, numbers * len(logits) // max(logits.numel(), 1))
    for start in range(0, len(logits), samples):
        yield slice(start, start + samples)


def of_rows(value, rows: slice, dtype: Optional[torch.dtype] = None):
    """The samples' part of what has a value for each of them; probs come in ``dtype``."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    value = value[rows]
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def reduce(losses: Tensor, reduction: str, ignored: Optional[Tensor] = None) -> Tensor:
    if reduction == 'none':
        return losses
    if reduction == 'sum':
        return losses.sum()
    if ignored is not None:
        return losses.sum() / (~ignored).sum().clamp(min=1)
    return losses.sum() / max(losses.numel(), 1)


def times(weight, losses: Tensor) -> Tensor:
    """weight * losses, in which 0 times infinity is 0."""
    if isinstance(weight, Tensor):
        return (weight * losses).masked_fill(weight == 0, 0)
    return weight * losses if weight else torch.zeros_like(losses)


def mix(hard: Tensor, soft: Tensor, alpha: Union[float, Tensor], *, keep_hard: bool = False) -> Tensor:
    r"""PS-KD's mixture of two losses, :math:`(1-\alpha)\, \mathrm{hard} + \alpha\, \mathrm{soft}`.

    The cross-entropy is linear in its target, so that mixing the losses is mixing the targets (ICCV 2021, eq. 2 and 3).

    Args:
        hard: loss against the labels, of any shape.
        soft: loss against the past prediction, same shape.
        alpha: share of the past in [0, 1]: a number, or a tensor of that shape (0 for samples that have no past).
        keep_hard: the label's term stays whole: ``hard + alpha * soft``.

    Example:
        >>> hard, soft = torch.tensor([2.0, 2.0]), torch.tensor([1.0, torch.inf])
        >>> mix(hard, soft, torch.tensor([0.5, 0.0]))  # what has no past may hold anything
        tensor([1.5000, 2.0000])
    """
    return (hard if keep_hard else times(1 - alpha, hard)) + times(alpha, soft)


def class_dot(probs: Tensor, log_probs: Tensor) -> Tensor:
    """sum over dimension 1 of probs * log_probs, in which 0 times infinity is 0.

    On the CPU a few samples at a time, in one buffer: fresh pages for N x C products cost three times the arithmetic.
    """
    samples = max(1, 2**22 * len(probs) // max(probs.numel(), 1))
    if probs.device.type != 'cpu' or samples >= len(probs) or tracing():
        out = (probs * log_probs).nansum(1)
    else:
        buffer = log_probs.new_empty((samples, *log_probs.shape[1:]))
        out = log_probs.new_empty((len(log_probs), *log_probs.shape[2:]))
        for i in range(0, len(probs), samples):
            x, y = probs[i : i + samples], log_probs[i : i + samples]
            torch.nansum(torch.mul(x, y, out=buffer[: len(x)]), 1, out=out[i : i + samples])
    # A softmax of what is not finite is NaN for every class.
    return out.masked_fill((probs.select(1, 0) + log_probs.select(1, 0)).isnan(), math.nan)


def kl(log_target: Tensor, log_probs: Tensor) -> Tensor:
    """sum over dimension 1 of q (log q - log p), in which a term with q = 0 is 0."""
    distance = (log_target - log_probs).masked_fill_(log_target == -math.inf, 0)
    return (log_target.exp() * distance).sum(1)


def other_classes(logits: Tensor) -> int:
    """The number of classes beside the label's, of a single class 1: nothing is spread over them."""
    return max(logits.shape[1] - 1, 1)
