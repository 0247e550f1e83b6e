"""CS-KD: the prediction for another sample of the class as the teacher."""

from typing import Optional

from torch import Tensor

from ..checks import check_weight
from .pskd import cross_entropy
from .soft import distillation_kl

__all__ = ['cskd_loss']


def cskd_loss(
    logits: Tensor, labels: Optional[Tensor], partner_logits: Tensor, *, temperature: float = 4.0, weight: float = 1.0
) -> Tensor:
    r"""CS-KD: cross-entropy, and the prediction for another sample of the same class x' as the teacher,
    :math:`\mathrm{CE}(z(x), y) + \lambda\, T^2\, \mathrm{KL}(\mathrm{softmax}(z(x')/T) \,\|\,
    \mathrm{softmax}(z(x)/T))`.

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020, eq. 3
    https://arxiv.org/abs/2003.13964

    Args:
        logits: of the anchors x, ``[N, C]``.
        labels: class ids ``[N]``, or probs ``[N, C]``. None leaves the cross-entropy to the caller (a toolkit's own
            loss module).
        partner_logits: of each anchor's partner x', ``[N, C]``; a constant. Compute them in training mode, in a pass of
            their own: batch-norm statistics of anchors and partners do not mix.
        temperature: T > 0.
        weight: lambda, at least 0.

    Example:
        >>> import torch
        >>> logits, partners = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
        >>> cskd_loss(logits, torch.tensor([0]), partners, temperature=2.0)  # 0.3133 + 0.3610
        tensor(0.6742)
    """
    check_weight('weight', weight)
    kl = weight * distillation_kl(logits, partner_logits, temperature)
    return kl if labels is None else cross_entropy(logits, labels) + kl
