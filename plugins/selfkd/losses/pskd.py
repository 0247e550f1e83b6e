"""PS-KD: cross-entropy against the label, softened by a past prediction."""

from typing import Any, Dict, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_alpha, check_labels, check_logits, check_of_rows, check_probs, check_top_k, wide
from ..topk import TopK
from ._common import mix, reduce, times, weights
from ._mixed_nll import Mixture, mixed_nll
from .soft import soft_cross_entropy

__all__ = ['PSKDParts', 'cross_entropy', 'progressive_targets', 'pskd_cross_entropy', 'pskd_loss']


class PSKDParts(NamedTuple):
    """What ``pskd_loss`` is made of, reduced as the loss is, without gradient: for logs.

    Attributes:
        hard: the labels' part, ``(1 - alpha)`` times the cross-entropy against them (smoothed, if asked for).
        soft: the past's part, ``alpha`` times the cross-entropy against it. The two sum to the loss.
        nll: negative log-likelihood of class ids; 0 beside probs.
    """

    hard: Tensor
    soft: Tensor
    nll: Tensor


def progressive_targets(
    labels_or_probs: Tensor, past_probs: Union[Tensor, TopK], alpha, *, num_classes: Optional[int] = None
) -> Tensor:
    r"""PS-KD's softened target, :math:`q = (1 - \alpha)\, y + \alpha\, p_\mathrm{past}`.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021, eq. 2
    https://arxiv.org/abs/2006.12000
    ``pskd_loss`` computes the loss of these targets without building them.

    Args:
        labels_or_probs: class ids ``[N, ...]`` (integers) or hard targets as probs ``[N, C, ...]``.
        past_probs: past predictions as probs ``[N, C, ...]`` or ``TopK`` (``[N]`` samples only).
        alpha: share of the past prediction in [0, 1]: a number, or a tensor ``[N, ...]`` with one per sample.
        num_classes: C; needed for ``TopK`` with class ids only.

    Returns:
        probs ``[N, C, ...]``, float32 or wider.

    Example:
        >>> progressive_targets(torch.tensor([0]), torch.tensor([[0.5, 0.25, 0.25]]), alpha=0.8)
        tensor([[0.6000, 0.2000, 0.2000]])
    """
    hard_is_ids = not labels_or_probs.is_floating_point()
    if isinstance(past_probs, TopK):
        if num_classes is None:
            if hard_is_ids:
                raise ValueError('num_classes: needed with class ids and a TopK past, got None')
            num_classes = labels_or_probs.shape[1]
        past_probs = past_probs.dense(num_classes)
    if num_classes is not None and num_classes != past_probs.shape[1]:
        raise ValueError(f'num_classes: past_probs has {past_probs.shape[1]} classes, got {num_classes}')
    past = past_probs.detach().to(wide(past_probs.dtype))
    check_probs('past_probs', past, past.shape)
    alpha = check_alpha(alpha, past)
    if hard_is_ids:
        labels = check_labels(labels_or_probs, past)
        hard = torch.zeros_like(past).scatter(1, labels.unsqueeze(1), 1)
    else:
        check_probs('labels_or_probs', labels_or_probs, past.shape)
        hard = labels_or_probs.to(past.dtype)
    share = alpha.unsqueeze(1) if isinstance(alpha, Tensor) and alpha.dim() else alpha
    return hard + share * (past - hard)


def pskd_loss(
    logits: Tensor,
    labels_or_probs: Tensor,
    past_probs: Union[Tensor, TopK, None],
    alpha,
    *,
    ignore_index: Optional[int] = None,
    reduction: str = 'mean',
    label_smoothing: float = 0.0,
    keep_hard: bool = False,
    normalized: bool = False,
    return_parts: bool = False,
):
    r"""PS-KD: cross-entropy against the progressive target,
    :math:`-\sum_c ((1-\alpha)\, y_c + \alpha\, p_{\mathrm{past},c}) \log \mathrm{softmax}(z)_c`.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021, eq. 2 and 3
    https://arxiv.org/abs/2006.12000

    With ``alpha=0`` it is plain cross-entropy. No temperature, no T^2. The target is never built: a step costs about
    as much as plain cross-entropy, and holds no more ``N x C`` tensors than it (docs/performance.md).

    Args:
        logits: z, ``[N, C, ...]``, any floating dtype.
        labels_or_probs: y, class ids ``[N, ...]`` or probs ``[N, C, ...]`` (smoothed or mixed labels).
        past_probs: ``[N, C, ...]``, or ``TopK`` for logits ``[N, C]``; a constant. None only with ``alpha=0``.
        alpha: in [0, 1], a number, or a tensor ``[N, ...]`` with one per sample: 0 for samples that have no past yet.
        ignore_index: class ids of this value contribute nothing, whatever is predicted there (in the past as well), and
            are not counted by ``'mean'``.
        reduction: ``'none'`` (``[N, ...]``), ``'mean'`` over the samples and positions not ignored, or ``'sum'``.
            Where nothing is left to average, the result is a zero that is joined to the graph.
        label_smoothing: share of y that is spread evenly over the other C - 1 classes before mixing, for class ids. It
            is fairseq's epsilon; ``torch.nn.functional.cross_entropy`` spreads over all C.
        keep_hard: the label's term keeps its whole weight, 1 instead of ``1 - alpha``.
        normalized: ``logits`` are log-probabilities already (log_softmax was applied), float32 or wider.
        return_parts: return the pair (loss, ``PSKDParts``).

    Raises:
        ValueError: alpha outside [0, 1], shapes that do not match, an unknown reduction, ``ignore_index``
            or ``label_smoothing`` beside probs;
            on the CPU, where looking costs no device synchronisation, also probs that are not distributions
            and class ids out of range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> past = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2]])
        >>> loss = pskd_loss(logits, torch.tensor([0, 1]), past, alpha=0.5)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.5955
    """
    check_logits(logits, reduction)
    alpha = check_alpha(alpha, logits)
    if past_probs is None and (isinstance(alpha, Tensor) or alpha != 0):
        raise ValueError(f'past_probs: None is allowed with alpha=0 only, got alpha={alpha}')
    if not isinstance(alpha, Tensor) and alpha == 0:
        past_probs = None

    if not 0 <= label_smoothing < 1:
        raise ValueError(f'label_smoothing: must lie in [0, 1), got {label_smoothing}')
    if labels_or_probs.is_floating_point() and label_smoothing:
        raise ValueError('label_smoothing: needs class ids, but labels_or_probs holds probs')
    labels, ignored = _checked_labels(labels_or_probs, logits, ignore_index)
    past, classes, check = past_probs, None, None
    if isinstance(past, TopK):
        check_top_k('past_probs', *past, logits, ignored)
        past, classes = past
    elif past is not None:
        check = check_of_rows('past_probs', past, logits.shape, ignored)

    past = past if past is None else past.detach()
    mixture = Mixture(labels, past, classes, alpha, label_smoothing, ignored, normalized, keep_hard)
    loss, *parts = mixed_nll(logits, mixture, reduction, check)
    if not return_parts:
        return loss
    hard, soft, nll = [part.detach() for part in parts]  # a list: torch.compile 2.1 breaks at the other
    of_hard, of_soft = weights(alpha, keep_hard)
    weighted = (times(of_hard, hard), times(of_soft, soft), nll)
    return loss, PSKDParts(*[reduce(part, reduction, ignored) for part in weighted])


def _checked_labels(labels: Tensor, logits: Tensor, ignore_index: Optional[int]) -> Tuple[Tensor, Optional[Tensor]]:
    """Class ids, with some class in the place of ``ignore_index``, or probs; and where that was."""
    if labels.is_floating_point():
        if ignore_index is not None:
            raise ValueError(f'ignore_index: needs class ids, but labels_or_probs holds probs; got {ignore_index}')
        check_probs('labels_or_probs', labels, logits.shape)
        return labels.detach(), None
    if ignore_index is None:
        return check_labels(labels, logits), None
    ignored = labels == ignore_index
    return check_labels(labels.masked_fill(ignored, 0), logits), ignored


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Plain cross-entropy, with the checks of ``pskd_loss``."""
    return pskd_loss(logits, labels, None, 0.0)


def pskd_cross_entropy(
    logits: Tensor,
    target: Tensor,
    past_probs: Union[Tensor, TopK],
    alpha,
    *,
    weight: Optional[Tensor] = None,
    ignore_index: int = -100,
    reduction: str = 'mean',
    label_smoothing: float = 0.0,
    keep_hard: bool = False,
    return_parts: bool = False,
):
    """``torch.nn.functional.cross_entropy`` with its target softened by past predictions: ``pskd_loss`` with
    the arguments, and the normalisation, of torch's own.

    Args:
        logits: ``[N, C, ...]``.
        target: class ids ``[N, ...]`` or probs ``[N, C, ...]``.
        past_probs: ``[N, C, ...]``, or ``TopK`` for logits ``[N, C]``; a constant.
        alpha: in [0, 1], a number, or a tensor ``[N]`` with one per sample.
        weight: of the classes, ``[C]``. As in torch's, the mean over class ids divides by the sum of their weights.
        ignore_index: class ids of this value contribute nothing.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        label_smoothing: share of the target that is spread evenly over all C classes before mixing.
        keep_hard: the label's term keeps its whole weight, 1 instead of ``1 - alpha``.
        return_parts: return the pair (loss, ``PSKDParts``).

    Example:
        >>> logits, target, past = torch.randn(4, 3), torch.tensor([0, 1, 2, -100]), torch.full((4, 3), 1 / 3)
        >>> options = dict(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
        >>> plain = F.cross_entropy(logits, target, **options)
        >>> torch.allclose(pskd_cross_entropy(logits, target, past, 0.0, **options), plain)
        True
    """
    ids, classes = not target.is_floating_point(), logits.shape[1]
    common: Dict[str, Any] = dict(keep_hard=keep_hard, return_parts=return_parts)
    if weight is None and (ids or not label_smoothing):
        smoothing = label_smoothing * (classes - 1) / classes  # pskd_loss spreads over the other classes
        options: Dict[str, Any] = dict(ignore_index=ignore_index, label_smoothing=smoothing) if ids else {}
        alpha = _per_sample(alpha, target, ids)
        return pskd_loss(logits, target, past_probs, alpha, reduction=reduction, **options, **common)
    past = past_probs.dense(classes) if isinstance(past_probs, TopK) else past_probs
    weight = weight if weight is None else weight.to(wide(logits.dtype))  # the model's half-precision buffer, say
    soft = soft_cross_entropy(logits, past, class_weight=weight, reduction='none')
    wide_logits = logits.to(wide(logits.dtype))
    options = dict(ignore_index=ignore_index) if ids else {}  # torch takes none beside probs
    hard = F.cross_entropy(wide_logits, target, weight, reduction='none', label_smoothing=label_smoothing, **options)
    valid = target != ignore_index if ids else None
    if valid is not None:
        soft = soft.masked_fill(~valid, 0)
    alpha = check_alpha(_per_sample(alpha, hard, True), logits)
    over = (reduction, target, weight, valid)
    loss = _reduce_as_torch(mix(hard, soft, alpha, keep_hard=keep_hard), *over)
    if not return_parts:
        return loss
    nll = F.nll_loss(wide_logits.log_softmax(1), target, reduction='none', **options) if ids else torch.zeros_like(hard)
    of_hard, of_soft = weights(alpha, keep_hard)
    parts = (times(of_hard, hard), times(of_soft, soft), nll)
    return loss, PSKDParts(*[_reduce_as_torch(part.detach(), *over) for part in parts])


def _reduce_as_torch(
    losses: Tensor, reduction: str, target: Tensor, weight: Optional[Tensor], valid: Optional[Tensor]
) -> Tensor:
    """The mean over class ids divides by the weights of those that are valid."""
    if reduction != 'mean' or valid is None:
        return reduce(losses, reduction)
    weights = valid if weight is None else weight[target.masked_fill(~valid, 0)] * valid
    return losses.sum() / weights.sum()


def _per_sample(alpha, like: Tensor, ids: bool):
    """Alpha, where it is one per sample, with a value for each of the sample's positions."""
    if not isinstance(alpha, Tensor) or not alpha.dim():
        return alpha
    shape = like.shape if ids else like.shape[:1] + like.shape[2:]
    return alpha.view(-1, *[1] * (len(shape) - 1)).expand(shape)
