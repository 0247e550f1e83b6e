"""All of the loss arithmetic of selfkd, as functions.

Shape letters used on this page: N samples, C classes, ``...`` any further dimensions. The class dimension is 1,
as in :func:`torch.nn.functional.cross_entropy`, so ``[N, C]``, ``[N, C, H, W]`` and ``[tokens, C]`` all work.
*Logits* are unnormalised; *probs* are non-negative and sum to 1 over the class dimension. Mixing, softmax and
KL are computed in float32 (float64 for float64 logits), whatever the logits' dtype. Classes may be masked by logits of
-inf: a term of probability 0 is 0, whatever its logarithm.

Everything that stands for a teacher (past predictions, partners) is treated as a constant: no gradient flows into it.
"""

import math
from typing import Any, Dict, NamedTuple, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    REDUCTIONS,
    check_alpha,
    check_labels,
    check_logits,
    check_probs,
    check_reduction,
    check_same_shape,
    check_temperature,
    check_top_k,
    check_weight,
    free_to_look,
    tracing,
    wide,
)

__all__ = [
    'PSKDParts',
    'TopK',
    'attention_transfer',
    'byot_loss',
    'cskd_loss',
    'ddgsd_loss',
    'distillation_kl',
    'frskd_loss',
    'hint_loss',
    'overhaul_loss',
    'progressive_targets',
    'pskd_cross_entropy',
    'pskd_loss',
    'quality_focal_loss',
    'sla_loss',
    'soft_cross_entropy',
    'tfkd_loss',
    'tfkd_regularization',
]

UNIT_NORMAL_MARGIN = -math.sqrt(2 / math.pi)  # the mean of the negative values of a unit normal


class TopK(NamedTuple):
    """A distribution over C classes kept as its k largest probabilities; the rest of the mass is spread evenly.

    Attributes:
        values: probabilities of the kept classes, ``[N, k]``.
        classes: their class ids, integers, ``[N, k]``, without repetition in a row.
    """

    values: Tensor
    classes: Tensor

    def rest(self, num_classes: int) -> Tensor:
        """Probability of each class that was not kept, ``[N]``."""
        others = num_classes - self.values.shape[1]
        if others == 0:
            return torch.zeros_like(self.values[:, 0])
        return (1 - self.values.sum(1)).clamp_(min=0) / others

    def dense(self, num_classes: int) -> Tensor:
        """The same distribution as probs ``[N, C]``."""
        probs = self.rest(num_classes)[:, None].repeat(1, num_classes)
        return probs.scatter_(1, self.classes.long(), self.values)


class PSKDParts(NamedTuple):
    """What :func:`pskd_loss` is made of, reduced as the loss is, without gradient: for logs.

    Attributes:
        hard: cross-entropy against the labels (smoothed, if asked for).
        soft: cross-entropy against the past predictions.
        nll: negative log-likelihood of the labels.
    """

    hard: Tensor
    soft: Tensor
    nll: Tensor


def soft_cross_entropy(logits: Tensor, target_probs: Tensor, *, class_weight=None, reduction: str = 'mean') -> Tensor:
    r"""Cross-entropy against soft targets, :math:`-\sum_c q_c \log \mathrm{softmax}(z)_c`.

    Args:
        logits: ``[N, C, ...]``.
        target_probs: targets q, same shape; taken as a constant.
        class_weight: C factors (tensor or list) on the classes' terms, as ``weight`` of
            :func:`torch.nn.functional.cross_entropy` with soft targets. ``'mean'`` still divides by the number of
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
    check_probs('target_probs', target_probs, logits.shape)
    if class_weight is not None:
        factors = torch.as_tensor(class_weight, dtype=target_probs.dtype, device=target_probs.device)
        target_probs = target_probs * factors.view(-1, *[1] * (logits.dim() - 2))
    losses, *_ = _mixed_nll(_log_softmax(logits), None, target_probs, None, 1.0, 0.0, None)
    return _reduce(losses, reduction)


def progressive_targets(
    labels_or_probs: Tensor, past_probs: Union[Tensor, TopK], alpha, *, num_classes: Optional[int] = None
) -> Tensor:
    r"""PS-KD's softened target, :math:`q = (1 - \alpha)\, y + \alpha\, p_\mathrm{past}`.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021, eq. 2
    https://arxiv.org/abs/2006.12000
    :func:`pskd_loss` computes the loss of these targets without building them.

    Args:
        labels_or_probs: class ids ``[N, ...]`` (integers) or hard targets as probs ``[N, C, ...]``.
        past_probs: past predictions as probs ``[N, C, ...]`` or :class:`TopK` (``[N]`` samples only).
        alpha: share of the past prediction in [0, 1]: a number, or a tensor ``[N, ...]`` with one per sample.
        num_classes: C; needed for :class:`TopK` with class ids only.

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
        past_probs: ``[N, C, ...]``, or :class:`TopK` for logits ``[N, C]``; a constant. None only with ``alpha=0``.
        alpha: in [0, 1], a number, or a tensor ``[N, ...]`` with one per sample: 0 for samples that have no past yet.
        ignore_index: class ids of this value contribute nothing, whatever is predicted there (in the past as well), and
            are not counted by ``'mean'``.
        reduction: ``'none'`` (``[N, ...]``), ``'mean'`` over the samples and positions not ignored, or ``'sum'``.
            Where nothing is left to average, the result is a zero that is joined to the graph.
        label_smoothing: share of y that is spread evenly over the other C - 1 classes before mixing, for class ids. It
            is fairseq's epsilon; :func:`torch.nn.functional.cross_entropy` spreads over all C.
        normalized: ``logits`` are log-probabilities already (log_softmax was applied), float32 or wider.
        return_parts: return the pair (loss, :class:`PSKDParts`). For class ids.

    Raises:
        ValueError: alpha outside [0, 1], shapes that do not match, an unknown reduction, ``ignore_index``,
            ``label_smoothing`` or ``return_parts`` beside probs;
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

    labels, ignored = labels_or_probs, None
    if labels.is_floating_point():
        if ignore_index is not None:
            raise ValueError(f'ignore_index: needs class ids, but labels_or_probs holds probs; got {ignore_index}')
        if label_smoothing or return_parts:
            raise ValueError('label_smoothing, return_parts: need class ids, but labels_or_probs holds probs')
        check_probs('labels_or_probs', labels, logits.shape)
    else:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f'label_smoothing: must lie in [0, 1), got {label_smoothing}')
        if ignore_index is not None:
            ignored = labels == ignore_index
            labels = labels.masked_fill(ignored, 0)
        labels = check_labels(labels, logits)
    past, classes = past_probs, None
    if isinstance(past, TopK):
        check_top_k('past_probs', *past, logits)
        past, classes = past
    elif past is not None:
        check_probs('past_probs', past, logits.shape, ignored)

    log_probs = logits if normalized else _log_softmax(logits)
    if labels.is_floating_point():
        target = labels if past_probs is None else progressive_targets(labels, past_probs, alpha)
        terms = _mixed_nll(log_probs, None, target, None, 1.0, 0.0, None)
    else:
        terms = _mixed_nll(log_probs, labels, past, classes, alpha, label_smoothing, ignored)
    loss = _reduce(terms[0], reduction, ignored)
    if not return_parts:
        return loss
    return loss, PSKDParts(*(_reduce(term.detach(), reduction, ignored) for term in terms[1:]))


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
) -> Tensor:
    """:func:`torch.nn.functional.cross_entropy` with its target softened by past predictions: :func:`pskd_loss` with
    the arguments, and the normalisation, of torch's own.

    Args:
        logits: ``[N, C, ...]``.
        target: class ids ``[N, ...]`` or probs ``[N, C, ...]``.
        past_probs: ``[N, C, ...]``, or :class:`TopK` for logits ``[N, C]``; a constant.
        alpha: in [0, 1], a number, or a tensor ``[N]`` with one per sample.
        weight: of the classes, ``[C]``. As in torch's, the mean over class ids divides by the sum of their weights.
        ignore_index: class ids of this value contribute nothing.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        label_smoothing: share of the target that is spread evenly over all C classes before mixing.

    Example:
        >>> logits, target, past = torch.randn(4, 3), torch.tensor([0, 1, 2, -100]), torch.full((4, 3), 1 / 3)
        >>> options = dict(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
        >>> plain = F.cross_entropy(logits, target, **options)
        >>> torch.allclose(pskd_cross_entropy(logits, target, past, 0.0, **options), plain)
        True
    """
    ids, classes = not target.is_floating_point(), logits.shape[1]
    if weight is None and (ids or not label_smoothing):
        smoothing = label_smoothing * (classes - 1) / classes  # pskd_loss spreads over the other classes
        options: Dict[str, Any] = dict(ignore_index=ignore_index, label_smoothing=smoothing) if ids else {}
        return pskd_loss(logits, target, past_probs, _per_sample(alpha, target, ids), reduction=reduction, **options)
    past = past_probs.dense(classes) if isinstance(past_probs, TopK) else past_probs
    soft = soft_cross_entropy(logits, past, class_weight=weight, reduction='none')
    wide_logits = logits.to(wide(logits.dtype))
    options = dict(ignore_index=ignore_index) if ids else {}  # torch takes none beside probs
    hard = F.cross_entropy(wide_logits, target, weight, reduction='none', label_smoothing=label_smoothing, **options)
    if ids:
        soft = soft.masked_fill(target == ignore_index, 0)
    alpha = check_alpha(_per_sample(alpha, hard, True), logits)
    losses = _times(1 - alpha, hard) + _times(alpha, soft)
    if reduction != 'mean':
        return _reduce(losses, reduction)
    if not ids:
        return losses.mean()
    valid = target != ignore_index
    total = valid.sum() if weight is None else (weight[target.masked_fill(~valid, 0)] * valid).sum()
    return losses.sum() / total


def _per_sample(alpha, like: Tensor, ids: bool):
    """Alpha, where it is one per sample, with a value for each of the sample's positions."""
    if not isinstance(alpha, Tensor) or not alpha.dim():
        return alpha
    shape = like.shape if ids else like.shape[:1] + like.shape[2:]
    return alpha.view(-1, *[1] * (len(shape) - 1)).expand(shape)


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
    logits = logits.to(wide(logits.dtype))
    target = target_probs.detach().to(logits.dtype)
    distance = (target - logits.sigmoid()).abs()
    return _reduce(distance**gamma * F.binary_cross_entropy_with_logits(logits, target, reduction='none'), reduction)


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
    if temperature != 1:  # on large maps the division itself takes time
        student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
    losses = temperature**2 * _kl(_log_softmax(teacher_logits.detach()), _log_softmax(student_logits))
    if reduction == 'batchmean':
        return losses.sum() / max(len(losses), 1)
    return _reduce(losses, reduction)


def cskd_loss(
    logits: Tensor, labels: Tensor, partner_logits: Tensor, *, temperature: float = 4.0, weight: float = 1.0
) -> Tensor:
    r"""CS-KD: cross-entropy, and the prediction for another sample of the same class x' as the teacher,
    :math:`\mathrm{CE}(z(x), y) + \lambda\, T^2\, \mathrm{KL}(\mathrm{softmax}(z(x')/T) \,\|\,
    \mathrm{softmax}(z(x)/T))`.

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020, eq. 3
    https://arxiv.org/abs/2003.13964

    Args:
        logits: of the anchors x, ``[N, C]``.
        labels: class ids ``[N]``, or probs ``[N, C]``.
        partner_logits: of each anchor's partner x', ``[N, C]``; a constant. Compute them in training mode, in a pass of
            their own: batch-norm statistics of anchors and partners do not mix.
        temperature: T > 0.
        weight: lambda, at least 0.

    Example:
        >>> logits, partners = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
        >>> cskd_loss(logits, torch.tensor([0]), partners, temperature=2.0)  # 0.3133 + 0.3610
        tensor(0.6742)
    """
    check_weight('weight', weight)
    return _cross_entropy(logits, labels) + weight * distillation_kl(logits, partner_logits, temperature)


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
    if student_map.dim() < 3 or _without_channels(student_map) != _without_channels(teacher_map):
        raise ValueError(
            'student_map, teacher_map: must be [N, C, ...] and differ in channels only, got '
            f'{tuple(student_map.shape)} and {tuple(teacher_map.shape)}'
        )
    difference = _attention(student_map) - _attention(teacher_map.detach())
    return difference.pow(2).sum() / max(difference.numel(), 1)


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
    margin = torch.as_tensor(margin, dtype=student.dtype, device=student.device)
    teacher = torch.maximum(teacher_map.detach().to(student.dtype), margin)
    counted = (student > teacher) | (teacher > 0)
    return ((student - teacher).pow(2) * counted).sum() / max(len(student), 1)


def byot_loss(
    logits: Tensor,
    aux_logits: Sequence[Tensor],
    feats: Tensor,
    aux_feats: Sequence[Tensor],
    labels: Optional[Tensor],
    *,
    alpha: float,
    beta: float,
    temperature: float = 3.0,
) -> Dict[str, Tensor]:
    r"""BYOT: the deepest classifier teaches auxiliary ones on shallower stages.

    Zhang et al., "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self
    Distillation", ICCV 2019, eq. 6
    https://arxiv.org/abs/1905.08094

    Args:
        logits: z of the deepest classifier, ``[N, C]``.
        aux_logits: z_i of the auxiliary ones, same shape.
        feats: what the deepest classifier reads, ``[N, D]``.
        aux_feats: what the auxiliary ones read, same shape.
        labels: class ids or probs. None leaves the cross-entropies, which weigh ``1 - alpha``, to the caller.
        alpha: share of the KL in each auxiliary loss, in [0, 1].
        beta: weight of the squared distances between features, at least 0.

    Returns:
        ``loss_cls`` and ``loss_aux`` (with labels), ``loss_kd`` = alpha T^2 sum_i KL(z -> z_i), ``loss_feature`` =
        beta sum_i
        ||F_i - F||^2, both averaged over N. The deepest classifier's side is a constant in the last two.

    Example:
        >>> z, f = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 3)
        >>> terms = byot_loss(z, [z], f, [f + 2], None, alpha=0.5, beta=0.1)
        >>> {name: round(term.item(), 4) for name, term in terms.items()}
        {'loss_kd': 0.0, 'loss_feature': 1.2}
    """
    check_alpha(alpha, logits)
    check_weight('beta', beta)
    if len(aux_logits) != len(aux_feats):
        raise ValueError(f'aux_feats: needs one for each of {len(aux_logits)} aux_logits, got {len(aux_feats)}')
    losses = {}
    if labels is not None:
        losses['loss_cls'] = (1 - alpha) * _cross_entropy(logits, labels)
        losses['loss_aux'] = (1 - alpha) * _sum([_cross_entropy(z, labels) for z in aux_logits])
    losses['loss_kd'] = alpha * _sum([distillation_kl(z, logits, temperature) for z in aux_logits])
    distances = [hint_loss(f, feats) * feats.shape[1:].numel() for f in aux_feats]
    losses['loss_feature'] = beta * _sum(distances)
    return losses


def ddgsd_loss(
    logits: Tensor,
    other_logits: Tensor,
    feats: Tensor,
    other_feats: Tensor,
    *,
    weight: float,
    mmd_weight: float,
    temperature: float = 3.0,
) -> Tensor:
    r"""DDGSD's consistency of two differently distorted views of the same images: each view's prediction teaches the
    other's, and the views' mean features are drawn together (linear MMD).

    Xu and Liu, "Data-Distortion Guided Self-Distillation for Deep Neural Networks", AAAI 2019
    https://doi.org/10.1609/aaai.v33i01.33015565

    Args:
        logits: of one view, ``[N, C]``; a constant where it teaches.
        other_logits: of the other view, in the same order.
        feats: what the classifier reads, ``[N, D]``.
        other_feats: of the other view.
        weight: of ``T^2 (KL(z' -> z) + KL(z -> z'))``.
        mmd_weight: of ``||mean F - mean F'||^2``, the means over the N images.
        temperature: T > 0.

    Example:
        >>> z, f = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 3)
        >>> ddgsd_loss(z, z, f, f + 2, weight=1.0, mmd_weight=0.5)
        tensor(6.)
    """
    check_weight('weight', weight)
    check_weight('mmd_weight', mmd_weight)
    check_same_shape('other_feats', other_feats, 'feats', feats)
    kl = distillation_kl(logits, other_logits, temperature) + distillation_kl(other_logits, logits, temperature)
    dtype = wide(feats.dtype)
    difference = (feats.sum(0, dtype=dtype) - other_feats.sum(0, dtype=dtype)) / max(len(feats), 1)
    return weight * kl + mmd_weight * difference.pow(2).sum()


def sla_loss(joint_logits: Tensor, logits: Tensor, labels: Tensor, *, weight: float = 1.0, temperature: float = 4.0):
    r"""Self-supervised label augmentation with the four rotations of each image, and its aggregation's teaching.

    Lee et al., "Self-supervised Label Augmentation via Input Transformations", ICML 2020
    https://arxiv.org/abs/1910.05872

    Args:
        joint_logits: of class and rotation, ``[4 N, 4 C]``: row ``4 i + k`` is image i turned k times, column ``4 c +
            k`` class c turned k times.
        logits: of the images as they are, ``[N, C]``.
        labels: class ids ``[N]``.
        weight: of the KL from the aggregated prediction to ``logits``.
        temperature: T of that KL.

    Returns:
        the cross-entropy of the joint labels, the weighted KL, and the aggregated logits ``[N, C]``: the mean over the
        rotations of each one's own columns.

    Example:
        >>> joint, kl, aggregated = sla_loss(torch.zeros(4, 8), torch.zeros(1, 2), torch.tensor([1]))
        >>> round(joint.item(), 4), kl.item(), tuple(aggregated.shape)  # log 8
        (2.0794, 0.0, (1, 2))
    """
    check_weight('weight', weight)
    if joint_logits.shape != (4 * logits.shape[0], 4 * logits.shape[1]):
        raise ValueError(
            f'joint_logits: must be [4 N, 4 C], 4 times logits {tuple(logits.shape)}, got {tuple(joint_logits.shape)}'
        )
    rotation = torch.arange(4, device=labels.device)
    joint = _cross_entropy(joint_logits, (4 * labels.unsqueeze(1) + rotation).flatten())
    own = joint_logits.view(len(logits), 4, logits.shape[1], 4).diagonal(dim1=1, dim2=3)  # [N, C, 4]
    aggregated = own.mean(2)
    return joint, weight * distillation_kl(logits, aggregated, temperature), aggregated


def tfkd_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 20.0,
    correct_prob: float = 0.99,
) -> Tensor:
    r"""TF-KD's regularisation variant, :math:`(1-\alpha)\, \mathrm{CE}(z, y) + \alpha\, \mathrm{KL}(u_T \,\|\,
    \mathrm{softmax}(z))`.

    Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR 2020, eq. 9 and 10
    https://arxiv.org/abs/1909.11723

    Args:
        logits: ``[N, C]``.
        labels: class ids ``[N]``.
        alpha: share of the KL to the made-up teacher, see :func:`tfkd_regularization`; in [0, 1].

    Example:
        >>> round(tfkd_loss(torch.zeros(1, 4), torch.tensor([0]), alpha=0.0).item(), 4)  # log 4
        1.3863
    """
    check_alpha(alpha, logits)
    regularization = tfkd_regularization(logits, labels, temperature=temperature, correct_prob=correct_prob)
    return (1 - alpha) * _cross_entropy(logits, labels) + alpha * regularization


def tfkd_regularization(
    logits: Tensor, labels: Tensor, *, temperature: float = 20.0, correct_prob: float = 0.99
) -> Tensor:
    """TF-KD's KL to a made-up teacher that is right with probability ``correct_prob`` and indifferent otherwise.

    As released: the teacher's *probabilities* u (``correct_prob`` for the label, the rest spread evenly) are divided by
    the temperature and go through another softmax; the student is not tempered. Summed over classes, averaged over N
    (the released code's factor of 100 for the 100 classes of CIFAR-100 undoes an average over classes).

    Example:
        >>> tfkd_regularization(torch.zeros(1, 4), torch.tensor([0]), temperature=1e6).item() < 1e-6  # both uniform
        True
    """
    check_logits(logits, 'mean')
    labels = check_labels(labels, logits)
    check_temperature(temperature)
    if not 0 < correct_prob <= 1:
        raise ValueError(f'correct_prob: must lie in (0, 1], got {correct_prob}')
    log_probs = _log_softmax(logits)
    teacher = torch.full_like(log_probs.detach(), (1 - correct_prob) / _others(logits))
    teacher = teacher.scatter(1, labels.unsqueeze(1), correct_prob)
    return _kl(_log_softmax(teacher / temperature), log_probs).sum() / max(len(logits), 1)


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
        losses['loss_cls'] = _cross_entropy(logits, labels)
        losses['loss_teacher'] = _cross_entropy(teacher_logits, labels)
    losses['loss_kd'] = alpha * distillation_kl(logits, teacher_logits, temperature)
    if beta:
        terms = [FEATURE_LOSSES[feature_loss](f, t) for f, t in zip(feats, teacher_feats)]
        if feature_loss == 'overhaul':
            terms = [term / 2 ** (len(terms) - 1 - i) for i, term in enumerate(terms)]
        losses['loss_feature'] = beta * _sum(terms)
    return losses


def _mixed_nll(log_probs, labels, past, classes, alpha, smoothing, ignored):
    """(1-a) hard + a soft per sample: hard = -log p_y (smoothed), soft = -sum_c q_c log p_c, and 0 where ignored.

    q is ``past``, probs ``[N, C, ...]``, or with ``classes`` top-k values. Without ``labels`` hard is 0, without
    ``past`` soft. Returns that and, as constants, its hard part, its soft part and -log p_y.
    """
    if tracing():  # torch.func and torch.compile differentiate (and compile) the plain operations
        past = past if past is None else past.detach()
        return _mixed_nll_terms(log_probs, labels, past, classes, alpha, smoothing, ignored)[:4]
    return _MixedNLL.apply(log_probs, labels, past, classes, alpha, smoothing, ignored)


def _mixed_nll_terms(log_probs, labels, past, classes, alpha, smoothing, ignored):
    """What :func:`_mixed_nll` returns, and the probability of each class that a top-k past has not kept."""
    zero = log_probs.new_zeros(()).expand(log_probs.shape[:1] + log_probs.shape[2:])
    total = log_probs.sum(1) if smoothing or classes is not None else None
    nll = hard = soft = zero
    rest = None
    if classes is not None:
        classes = classes.long()
        kept, rest = log_probs.gather(1, classes), TopK(past, classes).rest(log_probs.shape[1])
        others = total - kept.sum(1)
        rest = rest.masked_fill(~others.isfinite(), 0)  # next to masked classes, what was not kept is left out
        soft = -(_class_dot(past, kept) + _times(rest, others))
    elif past is not None:
        soft = -_class_dot(past, log_probs)
    if labels is not None:
        nll = -log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)
        each = smoothing / _others(log_probs)
        hard = (1 - smoothing - each) * nll - each * total if smoothing else nll.clone()
    terms = [_times(1 - alpha, hard) + _times(alpha, soft), hard, soft, nll]
    if ignored is not None:
        terms = [term.masked_fill(ignored, 0) for term in terms]
    return (*terms, rest)


class _MixedNLL(torch.autograd.Function):
    """:func:`_mixed_nll_terms`, which is linear in ``log_probs``, with its gradient in one piece.

    The only thing plain autograd does worse: the gradient with respect to ``log_probs`` is minus the mixed target,
    and here it is written once (-a q, or for a top-k past a constant row, then the label's share on top)
    where composed operations write and add one N x C tensor per term.
    """

    @staticmethod
    def forward(ctx, log_probs, labels, past, classes, alpha, smoothing, ignored):
        if past is not None and past.dtype == torch.float64:
            past = past.to(log_probs.dtype)
        *terms, rest = _mixed_nll_terms(log_probs, labels, past, classes, alpha, smoothing, ignored)
        ctx.save_for_backward(labels, past, classes, rest, alpha if isinstance(alpha, Tensor) else None, ignored)
        ctx.alpha, ctx.smoothing, ctx.shape = alpha, smoothing, log_probs.shape
        ctx.mark_non_differentiable(*terms[1:])
        return tuple(terms)

    @staticmethod
    def backward(ctx, grad, *unused):
        labels, past, classes, rest, alpha, ignored = ctx.saved_tensors
        alpha = ctx.alpha if alpha is None else alpha
        if ignored is not None:
            grad = grad.masked_fill(ignored, 0)
        soft, hard = (-alpha * grad).unsqueeze(1), (grad * (alpha - 1)).unsqueeze(1)
        each = ctx.smoothing / max(ctx.shape[1] - 1, 1)
        row = hard * each  # what every class of the sample gets from the smoothed label
        if classes is not None:
            grad_log_probs = (row + soft * rest.unsqueeze(1)).repeat(1, ctx.shape[1])
            grad_log_probs.scatter_(1, classes.long(), row + soft * past)
        elif past is not None:
            grad_log_probs = soft * past
            if ctx.smoothing:
                grad_log_probs += row
            if ignored is not None:  # whose past may hold anything
                grad_log_probs.masked_fill_(ignored.unsqueeze(1), 0)
        else:
            grad_log_probs = row.expand(ctx.shape).clone()
        if labels is not None:
            grad_log_probs.scatter_add_(1, labels.unsqueeze(1), hard * (1 - ctx.smoothing - each))
        return grad_log_probs, None, None, None, None, None, None


def _class_dot(probs: Tensor, log_probs: Tensor) -> Tensor:
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


def _times(weight, losses: Tensor) -> Tensor:
    """weight * losses, in which 0 times infinity is 0."""
    if isinstance(weight, Tensor):
        return (weight * losses).masked_fill(weight == 0, 0)
    return weight * losses if weight else torch.zeros_like(losses)


def _kl(log_target: Tensor, log_probs: Tensor) -> Tensor:
    """sum over dimension 1 of q (log q - log p), in which a term with q = 0 is 0."""
    distance = (log_target - log_probs).masked_fill_(log_target == -math.inf, 0)
    return (log_target.exp() * distance).sum(1)


def _others(logits: Tensor) -> int:
    """The number of classes beside the label's, of a single class 1: nothing is spread over them."""
    return max(logits.shape[1] - 1, 1)


def _without_channels(maps: Tensor):
    return (len(maps), *maps.shape[2:])


def _attention(maps: Tensor) -> Tensor:
    maps = maps.to(wide(maps.dtype)).flatten(2)
    if free_to_look(maps):
        squares = _mean_square(maps)
        peaks = squares.detach().amax(1)
        if peaks.min() > 1e-10 and peaks.max() < 1e15:
            return F.normalize(squares)
    # Squares of very small and very large values are beyond float32; a(F) is the same for any multiple of F.
    low, high = maps.detach().flatten(1).aminmax(dim=1)
    scale = torch.maximum(high, -low).clamp(min=torch.finfo(maps.dtype).tiny)
    return F.normalize(_mean_square(maps / scale.view(-1, 1, 1)))


def _mean_square(maps: Tensor) -> Tensor:
    if not maps.requires_grad:  # without the tensor of squares
        return torch.linalg.vector_norm(maps, dim=1).pow(2) / maps.shape[1]
    return maps.pow(2).mean(1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Plain cross-entropy, with the checks of :func:`pskd_loss`."""
    return pskd_loss(logits, labels, None, 0.0)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=1, dtype=wide(logits.dtype))


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], terms[0])


def _reduce(losses: Tensor, reduction: str, ignored: Optional[Tensor] = None) -> Tensor:
    if reduction == 'none':
        return losses
    if reduction == 'sum':
        return losses.sum()
    if ignored is not None:
        return losses.sum() / (~ignored).sum().clamp(min=1)
    return losses.sum() / max(losses.numel(), 1)
