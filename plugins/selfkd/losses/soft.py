"""Losses against soft targets."""

import math

import torch
from torch import Tensor

from ..checks import (
    REDUCTIONS,
    check_logits,
    check_of_rows,
    check_probs,
    check_reduction,
    check_same_shape,
    check_temperature,
)
from ..transfer import to_device
from ._common import reduce
from ._mixed_nll import Mixture, mixed_nll
from ._quality_focal import quality_focal, quality_focal_sum
from ._tempered_kl import tempered_kl

__all__ = ['distillation_kl', 'quality_focal_loss', 'soft_cross_entropy']


def soft_cross_entropy(logits: Tensor, target_probs: Tensor, *, class_weight=None, reduction: str = 'mean') -> Tensor:
    r"""Cross-entropy against soft targets, :math:`-\sum_c q_c \log \mathrm{softmax}(z)_c`.

    Args:
        logits: ``[N, C, ...]``.
        target_probs: targets q, same shape; taken as a constant.
        class_weight: C factors (tensor or list) on the classes' terms, as ``weight`` of
            ``torch.nn.functional.cross_entropy`` with soft targets. ``'mean'`` still divides by the number of
            samples.
        reduction: ``'none'`` (``[N, ...]``), ``'mean'`` over all samples and positions, or ``'sum'``. The mean of
            nothing is a zero that is joined to the graph.

    Raises:
        ValueError: shapes that differ, targets that are not distributions (checked on the CPU only, where looking
            costs no device synchronisation), an unknown reduction.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> soft_cross_entropy(logits, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor(0.4701)
    """
    check_logits(logits, reduction)
    check = check_of_rows('target_probs', target_probs, logits.shape)
    if class_weight is not None:
        check_probs('target_probs', target_probs, logits.shape)
        check = None  # the weighted ones are no distributions
        factors = to_device(torch.as_tensor(class_weight, dtype=target_probs.dtype), target_probs.device)
        target_probs = target_probs * factors.view(-1, *[1] * (logits.dim() - 2))
    return mixed_nll(logits, Mixture(None, target_probs.detach(), None, 1.0), reduction, check)[0]


def quality_focal_loss(logits: Tensor, target_probs: Tensor, *, gamma: float = 2.0, reduction: str = 'mean') -> Tensor:
    r"""Quality focal loss for sigmoid classifiers, :math:`|t - p|^\gamma\, \mathrm{BCE}(p, t)` with p = sigmoid(z).

    Li et al., "Generalized Focal Loss", NeurIPS 2020, eq. 3
    https://arxiv.org/abs/2006.04388
    The form in which a past prediction t enters one-stage detectors: it is least at p = t, which the focal loss with a
    soft target is not.

    Args:
        logits: of independent sigmoids, any shape.
        target_probs: t in [0, 1], same shape; a constant.
        gamma: 0, which is binary cross-entropy, or at least 1.
        reduction: ``'none'`` (the shape of ``logits``), ``'mean'`` or ``'sum'``.

    Example:
        >>> logits = torch.tensor([[0.0, 4.0]])
        >>> quality_focal_loss(logits, torch.tensor([[0.5, 0.0]]), reduction='none')  # p = 0.5, 0.982
        tensor([[0.0000, 3.8749]])
    """
    check_reduction(reduction)
    if gamma != 0 and not 1 <= gamma < math.inf:  # below 1 the gradient at p = t is not defined
        raise ValueError(f'gamma: must be 0 or at least 1, got {gamma}')
    check_same_shape('target_probs', target_probs, 'logits', logits)
    if reduction == 'none':
        return quality_focal(logits, target_probs.detach(), gamma)
    total = quality_focal_sum(logits, target_probs.detach(), gamma)
    return total / max(logits.numel(), 1) if reduction == 'mean' else total


def distillation_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, *, reduction: str = 'batchmean'
) -> Tensor:
    r"""Temperature KL, :math:`T^2\, \mathrm{KL}(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T))`.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015
    https://arxiv.org/abs/1503.02531
    The teacher is detached here, and nowhere else.

    Args:
        student_logits: ``[N, C, ...]``.
        teacher_logits: same shape.
        temperature: T > 0; the factor T^2 keeps the gradient's scale.
        reduction: the KL is summed over the classes; then ``'batchmean'`` divides the sum by N, ``'mean'`` by all
            positions (N times the further dimensions), ``'sum'`` and ``'none'`` (``[N, ...]``) do not divide.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
        >>> distillation_kl(student, teacher, temperature=2.0)
        tensor(0.3610)
    """
    check_logits(student_logits, reduction, (*REDUCTIONS, 'batchmean'))
    check_same_shape('teacher_logits', teacher_logits, 'student_logits', student_logits)
    check_temperature(temperature)
    losses = tempered_kl(student_logits, teacher_logits, temperature)
    if reduction == 'batchmean':
        return losses.sum() / max(len(losses), 1)
    return reduce(losses, reduction)
