"""FRSKD as a callback of Lightning's Trainer."""

from typing import Any, Dict, Optional, Sequence

import lightning.pytorch as pl
from torch import Tensor

import selfkd_torch
from selfkd.checks import at_least_zero, positive
from selfkd_torch.frskd import FRSKDOfBatches

from .callback import MethodCallback

__all__ = ['FRSKD']


class FRSKD(MethodCallback):
    """Feature refinement via self-knowledge distillation in every ``training_step``, for networks on images.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    ``Trainer(callbacks=[selfkd_lightning.FRSKD()])`` adds its terms to the cross-entropy that ``training_step``
    computes. The self-teacher is no part of the LightningModule: it is in the checkpoint's callbacks, and its weights
    are trained in the first group of the first optimizer.

    Args:
        alpha, beta, temperature, layers, num_classes: as of [`selfkd_torch.FRSKD`][].
        example: a batch of the network's inputs for the dry run; by default the module's ``example_input_array``, else
            an image of zeros, 3 x 224 x 224.
        loss: name of the sub-module that computes the loss, where that is not torch's cross-entropy.
        model: name of the sub-module that computes the logits; by default the only one with parameters.

    Logged in every step: ``loss_teacher``, ``loss_kd``, ``loss_feature``.

    Raises:
        ValueError: for settings that cannot work, here or when ``fit`` begins.
        RuntimeError: an epoch without a cross-entropy to add to.
    """

    name = 'FRSKD'

    def __init__(
        self,
        alpha: float = 2.0,
        *,
        beta: float = 100.0,
        temperature: float = 4.0,
        layers: Optional[Sequence[str]] = None,
        num_classes: Optional[int] = None,
        example: Optional[Tensor] = None,
        loss: Optional[str] = None,
        model: Optional[str] = None,
    ):
        at_least_zero('FRSKD', alpha=alpha, beta=beta)
        positive('FRSKD', temperature=temperature)
        super().__init__(loss, model)
        self._weights: Dict[str, Any] = dict(alpha=alpha, beta=beta, temperature=temperature)
        self._layers, self._num_classes, self._example = layers, num_classes, example
        self.frskd: Optional[selfkd_torch.FRSKD] = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.frskd is not None:
            self.frskd.remove_hooks()
        example = self._example
        if example is None and isinstance(pl_module.example_input_array, Tensor):
            example = pl_module.example_input_array
        self.frskd = selfkd_torch.FRSKD(
            self.network(pl_module), self._layers, self._num_classes, example=example, **self._weights
        )
        if self._saved:
            self.frskd.load_state_dict(self._saved)
        if not trainer.optimizers:
            raise ValueError('FRSKD: configure_optimizers gives none that could train the self-teacher')
        # Into a group that is there, so that schedules hold for them.
        trainer.optimizers[0].param_groups[0]['params'].extend(self.frskd.parameters())

    def make(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        assert self._data is not None
        assert self.frskd is not None  # training has begun
        return FRSKDOfBatches(self._data, self.frskd)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if self.frskd is not None:
            self.frskd.remove_hooks()
