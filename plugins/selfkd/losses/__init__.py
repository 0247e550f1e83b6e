"""All of the loss arithmetic of selfkd, as functions.

Shape letters used on this page: N samples, C classes, ``...`` any further dimensions. The class dimension is 1,
as in ``torch.nn.functional.cross_entropy``, so ``[N, C]``, ``[N, C, H, W]`` and ``[tokens, C]`` all work.
*Logits* are unnormalised; *probs* are non-negative and sum to 1 over the class dimension. Mixing, softmax and
KL are computed in float32 (float64 for float64 logits), whatever the logits' dtype. Classes may be masked by logits of
-inf: a term of probability 0 is 0, whatever its logarithm.

Everything that stands for a teacher (past predictions, partners) is treated as a constant: no gradient flows into it.
"""

from ..topk import TopK
from ._common import mix
from .comparators import byot_loss, ddgsd_loss, sla_loss, tfkd_regularization
from .cskd import cskd_loss
from .frskd import FEATURE_LOSSES, attention_transfer, frskd_loss, hint_loss, overhaul_loss
from .linear import linear_pskd_loss
from .pskd import PSKDParts, progressive_targets, pskd_cross_entropy, pskd_loss
from .soft import distillation_kl, quality_focal_loss, soft_cross_entropy

__all__ = [
    'FEATURE_LOSSES',
    'PSKDParts',
    'TopK',
    'attention_transfer',
    'byot_loss',
    'cskd_loss',
    'ddgsd_loss',
    'distillation_kl',
    'frskd_loss',
    'hint_loss',
    'linear_pskd_loss',
    'mix',
    'overhaul_loss',
    'progressive_targets',
    'pskd_cross_entropy',
    'pskd_loss',
    'quality_focal_loss',
    'sla_loss',
    'soft_cross_entropy',
    'tfkd_regularization',
]
