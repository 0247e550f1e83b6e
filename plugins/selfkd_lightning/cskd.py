"""CS-KD as a callback of Lightning's Trainer."""

from typing import Any, Callable, Optional, Sequence

import lightning.pytorch as pl

import selfkd_torch
from selfkd.checks import at_least_zero, positive

from .callback import MethodCallback, TrainersBatches

__all__ = ['CSKD']


class CSKD(MethodCallback):
    """Class-wise self-knowledge distillation in every ``training_step``.

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020
    https://arxiv.org/abs/2003.13964

    ``Trainer(callbacks=[selfkd_lightning.CSKD()])`` adds the term to the cross-entropy that ``training_step`` computes.
    Partners are loaded beside each batch, and go through the network in a pass of their own.

    Args:
        weight, temperature, labels, seed: as of [`selfkd_torch.CSKD`][].
        inputs: gives the network's input from a batch that was moved to the device; by default its first entry.
        loss: name of the sub-module that computes the loss, where that is not torch's cross-entropy.
        model: name of the sub-module that computes the logits; by default the only one with parameters.

    Logged in every step: ``loss_cskd``. With other methods of this package in the same Trainer each has its part.

    Raises:
        ValueError: for settings that cannot work, here or when ``fit`` begins.
        RuntimeError: an epoch without a cross-entropy to add to.
    """

    name, by_rows = 'CSKD', True

    def __init__(
        self,
        weight: float = 1.0,
        *,
        temperature: float = 4.0,
        labels: Optional[Sequence[int]] = None,
        inputs: Optional[Callable] = None,
        seed: int = 0,
        loss: Optional[str] = None,
        model: Optional[str] = None,
    ):
        at_least_zero('CSKD', weight=weight)
        positive('CSKD', temperature=temperature)
        super().__init__(loss, model)
        self._settings = dict(weight=weight, temperature=temperature, labels=labels, inputs=inputs, seed=seed)

    def prepare(self, data: TrainersBatches) -> None:
        model = self.network(data.trainer.lightning_module)
        self._made = selfkd_torch.CSKD(data, model, **self._settings)  # type: ignore[arg-type]

    def make(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        self._made.call = 'a cross-entropy'
        return self._made
