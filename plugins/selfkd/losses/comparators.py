"""Other methods of self-distillation, to compare with."""

import functools
from typing import Dict, Optional, Sequence

import torch
from torch import Tensor

from ..checks import check_alpha, check_labels, check_logits, check_same_shape, check_temperature, check_weight, wide
from ._common import kl, log_softmax, other_classes
from .frskd import hint_loss
from .pskd import cross_entropy
from .soft import distillation_kl

__all__ = ['byot_loss', 'ddgsd_loss', 'sla_loss', 'tfkd_regularization']


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
        losses['loss_cls'] = (1 - alpha) * cross_entropy(logits, labels)
        losses['loss_aux'] = (1 - alpha) * functools.reduce(torch.add, [cross_entropy(z, labels) for z in aux_logits])
    kls = [distillation_kl(z, logits, temperature) for z in aux_logits]
    losses['loss_kd'] = alpha * functools.reduce(torch.add, kls)
    distances = [hint_loss(f, feats) * feats.shape[1:].numel() for f in aux_feats]
    losses['loss_feature'] = beta * functools.reduce(torch.add, distances)
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
    joint = cross_entropy(joint_logits, (4 * labels.unsqueeze(1) + rotation).flatten())
    own = joint_logits.view(len(logits), 4, logits.shape[1], 4).diagonal(dim1=1, dim2=3)  # [N, C, 4]
    aggregated = own.mean(2)
    return joint, weight * distillation_kl(logits, aggregated, temperature), aggregated


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
    log_probs = log_softmax(logits)
    teacher = torch.full_like(log_probs.detach(), (1 - correct_prob) / other_classes(logits))
    teacher = teacher.scatter(1, labels.unsqueeze(1), correct_prob)
    return kl(log_softmax(teacher / temperature), log_probs).sum() / max(len(logits), 1)
