"""What the losses share: log-softmax, products in which 0 times infinity is 0, reductions."""

import math
from typing import Iterator, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import wide
from ..topk import NUMBERS_AT_ONCE


def log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=1, dtype=wide(logits.dtype))


def softmax_and_log(logits: Tensor, log_out: Tensor, out: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """Softmax, in ``out``, and its logarithm, in ``log_out``, which may be the logits.

    Of one exponential: on CPUs nothing else takes as long.
    """
    if logits.dtype != log_out.dtype:
        logits = log_out.copy_(logits)
    probs = torch.softmax(logits, 1, out=out)
    log_probs = torch.sub(logits, logits.amax(1, keepdim=True), out=log_out)
    return probs, log_probs.add_(probs.amax(1, keepdim=True).log_())


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
    return losses if reduction == 'none' else losses.sum() / counted(losses.shape, reduction, ignored)


def counted(samples: torch.Size, reduction: str, ignored: Optional[Tensor] = None):
    """What the sum of the samples' losses is divided by."""
    if reduction != 'mean':
        return 1
    return max(samples.numel(), 1) if ignored is None else (~ignored).sum().clamp(min=1)


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
    of_hard, of_soft = weights(alpha, keep_hard)
    return times(of_hard, hard) + times(of_soft, soft)


def weights(alpha: Union[float, Tensor], keep_hard: bool):
    """Of the hard and the soft part of the mixture."""
    return (1 if keep_hard else 1 - alpha), alpha


def class_dot(probs: Tensor, log_probs: Tensor, out: Optional[Tensor] = None) -> Tensor:
    """sum over dimension 1 of probs * log_probs, in which 0 times infinity is 0; ``out`` is for the products."""
    # A softmax of what is not finite is NaN for every class.
    undefined = (probs.select(1, 0) + log_probs.select(1, 0)).isnan()
    return torch.mul(probs, log_probs, out=out).nansum(1).masked_fill(undefined, math.nan)


def kl(log_target: Tensor, log_probs: Tensor) -> Tensor:
    """sum over dimension 1 of q (log q - log p), in which a term with q = 0 is 0."""
    distance = (log_target - log_probs).masked_fill_(log_target == -math.inf, 0)
    return (log_target.exp() * distance).sum(1)


def other_classes(logits: Tensor) -> int:
    """The number of classes beside the label's, of a single class 1: nothing is spread over them."""
    return max(logits.shape[1] - 1, 1)
