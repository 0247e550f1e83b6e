"""FRSKD: what the network learns from its self-teacher's maps and logits."""

import functools
import math
from typing import Callable, Dict, Optional, Sequence

import torch
from torch import Tensor

from ..checks import check_same_shape, check_weight, wide
from ..transfer import to_device
from ._attention import attention_distance
from .pskd import cross_entropy
from .soft import distillation_kl

__all__ = ['FEATURE_LOSSES', 'attention_transfer', 'frskd_loss', 'hint_loss', 'overhaul_loss']

UNIT_NORMAL_MARGIN = -math.sqrt(2 / math.pi)  # the mean of the negative values of a unit normal


def attention_transfer(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    r"""Attention transfer, :math:`\mathrm{mean}\,(a(F) - a(T))^2`; a(F) is the channel mean of F^2, flattened and
    L2-normalised.

    Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017
    https://arxiv.org/abs/1612.03928
    As in FRSKD, eq. 2: the mean runs over the samples and positions.

    Args:
        student_map: F, ``[N, C, ...]``.
        teacher_map: T, ``[N, C', ...]``; a constant. Channels may differ from F's, the further dimensions may not.

    Example:
        >>> student = torch.tensor([[[3.0, 0.0]]])  # one channel, two positions: a(F) = (1, 0)
        >>> attention_transfer(student, torch.tensor([[[0.0, 5.0]]]))
        tensor(1.)
    """
    _check_maps(student_map, teacher_map)
    return attention_distance([student_map], [teacher_map])


def hint_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """FitNet's hint, the mean squared difference of two feature maps of one shape; the teacher's is a constant.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, eq. 3
    https://arxiv.org/abs/1412.6550
    The student's map comes through a learnt adapter that gives it the teacher's channels (in FRSKD 1x1 convolution -
    batch norm - ReLU).

    Example:
        >>> hint_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor(2.)
    """
    check_same_shape('student_map', student_map, 'teacher_map', teacher_map, ' (an adapter is missing?)')
    difference = student_map.to(wide(student_map.dtype)) - teacher_map.detach()
    return difference.pow(2).sum() / max(difference.numel(), 1)


def overhaul_loss(student_map: Tensor, teacher_map: Tensor, *, margin=UNIT_NORMAL_MARGIN) -> Tensor:
    """Overhaul of feature distillation: margin ReLU on the teacher's side and partial L2, summed, over the N samples.

    Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, eq. 1 to 4
    https://arxiv.org/abs/1904.01866

    Args:
        student_map: after a learnt adapter (1x1 convolution - batch norm), ``[N, C, ...]``.
        teacher_map: before its ReLU, same shape; a constant. Below ``margin`` it is raised to it; where it
            is not positive, a student below it costs nothing.
        margin: the expected negative response, a number or ``[C, 1, 1]``. The default is that of a unit normal: what
            a batch norm gives before training, and what FRSKD's released code uses all through it.

    Example:
        >>> overhaul_loss(torch.tensor([[-2.0, 1.0]]), torch.tensor([[-5.0, 3.0]]), margin=-1.0)
        tensor(4.)
    """
    check_same_shape('student_map', student_map, 'teacher_map', teacher_map, ' (an adapter is missing?)')
    student = student_map.to(wide(student_map.dtype))
    teacher = teacher_map.detach().to(student.dtype)
    if isinstance(margin, Tensor):
        teacher = torch.maximum(teacher, to_device(margin.to(student.dtype), student.device))
    else:
        teacher = teacher.clamp(min=margin)
    counted = (student > teacher) | (teacher > 0)
    return ((student - teacher).pow(2) * counted).sum() / max(len(student), 1)


FEATURE_LOSSES = {'attention': attention_transfer, 'hint': hint_loss, 'overhaul': overhaul_loss}


def frskd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    feats: Sequence[Tensor],
    teacher_feats: Sequence[Tensor],
    labels: Optional[Tensor],
    *,
    alpha: float,
    beta: float,
    temperature: float = 4.0,
    feature_loss: str = 'attention',
    average: Optional[Callable[[Tensor], Tensor]] = None,
) -> Dict[str, Tensor]:
    r"""FRSKD: the network and its self-teacher learn the labels, and the network imitates the self-teacher,
    :math:`\mathrm{CE}(z_c, y) + \mathrm{CE}(z_t, y) + \alpha T^2 \mathrm{KL}(\mathrm{softmax}(z_t/T) \,\|\,
    \mathrm{softmax}(z_c/T)) + \beta \sum_i \mathrm{AT}(F_i, T_i)`.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021, eq. 2
    to 5
    https://arxiv.org/abs/2103.08273

    Args:
        logits: z_c of the classifier, ``[N, C, ...]``.
        teacher_logits: z_t of the self-teacher, same shape; a constant in the KL.
        feats: F_i of the network, fine to coarse.
        teacher_feats: T_i of the self-teacher, as many; constants.
        labels: class ids or probs. None leaves both cross-entropies to the caller (a toolkit's own loss module).
        alpha: weight of the KL, at least 0.
        beta: weight of the feature loss, at least 0; with 0 (soft labels only) the maps are not looked at.
        temperature: T > 0.
        feature_loss: ``'attention'``, ``'hint'`` or ``'overhaul'``. For the last two ``feats`` come from their
            adapters; the overhaul loss of level i of n is halved n - 1 - i times, as released.
        average: of the KLs ``[N, ...]``, a number, where positions are to be left out or weighed. By default their sum
            over N.

    Returns:
        the weighted terms ``loss_cls`` and ``loss_teacher`` (with labels), ``loss_kd``, and ``loss_feature`` (with
        beta); their sum is the loss.

    Example:
        >>> logits, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
        >>> maps = [torch.rand(1, 2, 4, 4), torch.rand(1, 4, 2, 2)]
        >>> terms = frskd_loss(logits, teacher, maps, maps, torch.tensor([0]), alpha=1.0, beta=100.0, temperature=2.0)
        >>> {name: round(term.item(), 4) for name, term in terms.items()}
        {'loss_cls': 0.3133, 'loss_teacher': 0.0486, 'loss_kd': 0.361, 'loss_feature': 0.0}
    """
    check_weight('alpha', alpha)
    check_weight('beta', beta)
    if feature_loss not in FEATURE_LOSSES:
        raise ValueError(f'feature_loss: must be one of {tuple(FEATURE_LOSSES)}, got {feature_loss!r}')
    if beta and len(feats) != len(teacher_feats):
        raise ValueError(f'feats: needs as many levels as teacher_feats, {len(teacher_feats)}, got {len(feats)}')
    losses = {}
    if labels is not None:
        losses['loss_cls'] = cross_entropy(logits, labels)
        losses['loss_teacher'] = cross_entropy(teacher_logits, labels)
    kl = distillation_kl(logits, teacher_logits, temperature, reduction='none' if average else 'batchmean')
    losses['loss_kd'] = alpha * (average(kl) if average else kl)
    if beta:
        losses['loss_feature'] = beta * _feature_loss(feature_loss, feats, teacher_feats)
    return losses


def _feature_loss(kind: str, feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]) -> Tensor:
    if kind == 'attention':
        for student_map, teacher_map in zip(feats, teacher_feats):
            _check_maps(student_map, teacher_map)
        return attention_distance(feats, teacher_feats)
    terms = [FEATURE_LOSSES[kind](f, t) for f, t in zip(feats, teacher_feats)]
    if kind == 'overhaul':
        terms = [term / 2 ** (len(terms) - 1 - i) for i, term in enumerate(terms)]
    return functools.reduce(torch.add, terms)


def _check_maps(student_map: Tensor, teacher_map: Tensor) -> None:
    shapes = [(len(maps), *maps.shape[2:]) for maps in (student_map, teacher_map)]
    if student_map.dim() < 3 or shapes[0] != shapes[1]:
        raise ValueError(
            'student_map, teacher_map: must be [N, C, ...] and differ in channels only, got '
            f'{tuple(student_map.shape)} and {tuple(teacher_map.shape)}'
        )
