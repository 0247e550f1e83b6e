"""CS-KD for the regions of MMDetection's two-stage detectors."""

from typing import Dict, List

from mmdet.models.losses.utils import weight_reduce_loss
from mmdet.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from selfkd.losses import distillation_kl
from selfkd.pairing import same_class_partners
from selfkd.checks import at_least_zero, positive
from selfkd_mmengine import SelfKDHook

from .heads import check_region_heads, region_heads, stage_of

__all__ = ['CSKDHook']


@HOOKS.register_module()
class CSKDHook(SelfKDHook):
    """Class-wise self-knowledge distillation between the regions of a batch (Faster, Mask, Cascade R-CNN).

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020
    https://arxiv.org/abs/2003.13964

    Each sampled foreground region takes as its partner the next one of its class in the batch (the last one the first),
    and the loss gets ``weight * T^2 * KL(partner || region)`` beside the head's own. The partner is a constant.
    Background, and classes with a single region, add nothing. The term is weighted and normalised as the head's own
    classification loss: with MMDetection's heads that is by the number of all sampled regions::

        custom_hooks = [dict(type='selfkd_mmdet.CSKDHook', weight=1.0, temperature=4.0)]

    Args:
        weight: lambda, at least 0.
        temperature: T. Defaults to 4, the paper's.

    Losses: ``loss_cskd``, the distillation term with its weight (with the prefix and the stage's loss weight in Cascade
    R-CNN), beside the head's own.

    Raises:
        ValueError: at the start of training, for detectors and losses that it does not support.
    """

    fires_every_step = False  # mmdet leaves out the loss of a batch without regions

    def __init__(self, weight: float = 1.0, temperature: float = 4.0):
        super().__init__()
        positive('CSKDHook', temperature=temperature)
        at_least_zero('CSKDHook', weight=weight)
        self.temperature, self.weight = temperature, weight

    def loss_modules(self, model: nn.Module) -> List[nn.Module]:
        return [head.loss_cls for head in region_heads(model)]

    def check(self, runner: Runner, model: nn.Module) -> None:
        check_region_heads('CSKDHook', model)

    def setup(self, runner: Runner, model: nn.Module) -> None:
        self.student = model

    def before_forward(self, inputs: Tensor) -> None:
        self.logs = {}

    def rewrite_loss(self, arguments: Dict[str, object], loss: Tensor) -> Tensor:
        if self.weight == 0:
            return loss
        stage, prefix = stage_of(self.student, self.tapped)
        logits, label = arguments['cls_score'], arguments['label']
        regions, partners = same_class_partners(label, ignore=region_heads(self.student)[stage].num_classes)
        arguments = {**arguments, 'weight': arguments['weight'][regions]}
        kl = distillation_kl(logits[regions], logits[partners], self.temperature, reduction='none')
        stage_weight = self.student.roi_head.stage_loss_weights[stage] if prefix else 1
        # An entry of its own, which the toolkit adds: what other hooks make of the head's loss does not touch it.
        value = self.reduced(weight_reduce_loss, kl, arguments)
        self.logs[f'{prefix}loss_cskd'] = stage_weight * self.weight * value
        return loss
