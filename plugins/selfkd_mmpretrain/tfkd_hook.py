"""TF-KD (regularisation variant) for MMPretrain classifiers, a comparator of the papers' tables."""

from typing import Any, Dict

from mmengine.runner import Runner
from mmpretrain.registry import HOOKS
from torch import Tensor, nn

from selfkd.checks import positive, share
from selfkd.losses import mix, tfkd_regularization
from selfkd_mmengine import PSKDHookBase

from .heads import ClassifierHook, mixes_samples

__all__ = ['TFKDHook']


@HOOKS.register_module()
class TFKDHook(ClassifierHook):
    """Teacher-free knowledge distillation by regularisation, for any classifier whose head has a ``loss_module``.

    Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR 2020
    https://arxiv.org/abs/1909.11723

    The loss becomes ``(1 - alpha) * own + alpha * KL(made-up teacher || prediction)``::

        default_hooks = dict(tfkd=dict(type='selfkd_mmpretrain.TFKDHook', alpha=0.1, temperature=20.0))

    Args:
        alpha: share of the KL, in [0, 1]. Defaults to 0.1, the released code's.
        temperature: of the made-up teacher.
        correct_prob: the probability it gives the label.

    Logged besides the loss: ``tfkd_kl``, the KL with its weight.

    Raises:
        ValueError: at the start of training, for what cannot work; each message says what to change.
    """

    averaged = ('tfkd_kl',)

    def __init__(self, alpha: float = 0.1, temperature: float = 20.0, correct_prob: float = 0.99):
        super().__init__()
        share('TFKDHook', alpha=alpha, correct_prob=correct_prob)
        positive('TFKDHook', temperature=temperature, correct_prob=correct_prob)
        self.alpha, self.temperature, self.correct_prob = alpha, temperature, correct_prob

    def check(self, runner: Runner, model: nn.Module) -> None:
        super().check(runner, model)
        if mixes_samples(model):
            raise ValueError(
                'TFKDHook: its teacher is made up from one label, and a mixed sample (Mixup, CutMix, ...) has several: '
                'remove batch_augments from model.train_cfg / data_preprocessor'
            )
        if any(isinstance(hook, PSKDHookBase) for hook in runner.hooks):
            raise ValueError('TFKDHook: PS-KD and TF-KD both replace the same target: use one of the two hooks')

    def rewrite_loss(self, arguments: Dict[str, Any], loss: Tensor) -> Tensor:
        kl = tfkd_regularization(
            arguments['cls_score'],
            arguments['label'],
            temperature=self.temperature,
            correct_prob=self.correct_prob,
        )
        self.logs['tfkd_kl'] = self.alpha * kl.detach()
        return mix(loss, kl, self.alpha)
