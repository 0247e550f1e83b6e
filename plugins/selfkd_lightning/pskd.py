"""PS-KD as a callback of Lightning's Trainer."""

import logging
import math
from typing import Any, Dict, Optional, Union

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn

import selfkd_torch
from selfkd.options import check_options, choose_teacher
from selfkd.renamed import renamed
from selfkd.schedule import may_end_early

from .callback import MethodCallback, TrainersBatches

__all__ = ['PSKD']

logger = logging.getLogger(__name__)

WAY_OUT = "use teacher='snapshot', which needs no rows"


class PSKD(MethodCallback):
    """Progressive self-knowledge distillation in every ``training_step``.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    ``Trainer(max_epochs=90, callbacks=[selfkd_lightning.PSKD(alpha=0.3)])`` softens the cross-entropy that
    ``training_step`` computes by what was predicted for the same samples in the last epoch. Which samples a batch holds
    is noted when the loader makes it. Past predictions go into Lightning's checkpoints.

    Args:
        alpha, teacher, teacher_mode, keep_hard, top_k, bank_dtype, bank_device, bank_momentum, num_classes: as of
            [`selfkd_torch.PSKD`][].
        interval, ema_decay: likewise, by steps of the optimizer (``trainer.global_step``).
        loss: name of the sub-module that computes the loss, as ``'criterion'``, where that is not torch's
            cross-entropy; see ``selfkd_torch.PSKD.tap``.
        model: for a copy: name of the sub-module that computes the logits; by default the only one with parameters.

    Logged besides the loss, in every step: ``pskd_alpha``, ``pskd_hard``, ``pskd_soft``, ``pskd_entropy``.
    The number of epochs is the Trainer's ``max_epochs``, or what its ``max_steps`` come to.

    Raises:
        ValueError: for settings that cannot work or would never act, here or when ``fit`` begins.
        RuntimeError: a training step without a loss that could be softened.
    """

    name, adds = 'PSKD', False

    @renamed(dtype='bank_dtype', device='bank_device')
    def __init__(
        self,
        alpha: float = 0.3,
        *,
        teacher: str = 'auto',
        teacher_mode: str = 'train',
        interval: Optional[int] = None,
        ema_decay: float = 0.999,
        keep_hard: bool = False,
        top_k: Optional[int] = None,
        bank_dtype: Union[str, torch.dtype] = 'float32',
        bank_device: Union[str, torch.device, None] = None,
        bank_momentum: float = 0.0,
        num_classes: Optional[int] = None,
        loss: Optional[str] = None,
        model: Optional[str] = None,
    ):
        self._settings: Dict[str, Any] = dict(alpha=alpha, teacher=teacher, teacher_mode=teacher_mode)
        self._settings.update(interval=interval, ema_decay=ema_decay, top_k=top_k, bank_dtype=bank_dtype)
        self._settings.update(bank_device=bank_device, bank_momentum=bank_momentum)
        check_options('PSKD', 'classification', dict(self._settings, model=model))
        self._settings.update(keep_hard=keep_hard, num_classes=num_classes)
        self.teacher = teacher
        super().__init__(loss, model)
        self._by_steps = False  # whether max_steps ends training

    @property
    def pskd(self) -> Optional[selfkd_torch.PSKD]:
        return self.method

    def loss(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        """In place of ``F.cross_entropy``, for those who rather say it themselves. In validation and testing it is
        ``F.cross_entropy``, so that a step may be shared.

        Raises:
            RuntimeError: in training, but outside ``training_step``; or without a Trainer that has this callback.
        """
        if self._in_step:
            return self.method.loss(logits, target, **options)
        if self._state is None or self._state.stage in (None, RunningStage.TRAINING):
            raise RuntimeError('PSKD: the loss is for training_step, under a Trainer that has this callback')
        return F.cross_entropy(logits, target, **options)

    @property
    def current_alpha(self) -> float:
        """Share of the past prediction in the epoch under way."""
        return self.pskd.current_alpha if self.pskd else 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        strategy = type(trainer.strategy)
        self._whole = strategy in (DDPStrategy, SingleDeviceStrategy)
        if stage == 'fit' and self.teacher in ('snapshot', 'ema') and not self._whole:
            raise ValueError(
                f"PSKD: under {strategy.__name__} no process has the whole model to copy: use teacher='bank'"
            )

    def tap(self, pl_module: nn.Module):
        module = pl_module.get_submodule(self._loss) if self._loss else None
        return self.method.tap(module, check=False)

    @property
    def by_rows(self) -> bool:  # type: ignore[override]  # it shows at the first loss
        return self.method.kind in ('auto', 'bank') if self.method else self.teacher == 'bank'

    def prepare(self, data: TrainersBatches) -> None:
        if self.teacher == 'bank' or (self.teacher == 'auto' and not data.why_not_numbered()):
            data.number('PSKD', WAY_OUT)

    def make(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> selfkd_torch.PSKD:
        options, call = {**self._settings, **self._length(trainer)}, 'a cross-entropy'
        if self.teacher == 'auto' and not self._whole:
            options['teacher'] = choose_teacher('auto', None)
        elif self.teacher != 'bank':
            try:
                options['model'] = self.network(pl_module)
            except ValueError:
                if self.teacher != 'auto':  # which may not need it
                    raise
            if self.teacher != 'auto':
                name = f'{type(pl_module).__name__}.{self.network_name(pl_module)}'
                call += f' of the logits that {name} gives (another module: model="name")'
        pskd = selfkd_torch.PSKD(self._data, **options)
        pskd.call = call
        if self._saved:
            pskd.load_state_dict(self._saved)
        stops = ['max_steps'] if trainer.max_steps != -1 and trainer.num_training_batches == math.inf else []
        stops += ['EarlyStopping'] if trainer.early_stopping_callbacks else []
        if any(isinstance(callback, Timer) and callback.time_remaining() is not None for callback in trainer.callbacks):
            stops.append('max_time')
        if stops and pskd.alpha and trainer.is_global_zero:
            training = f'{pskd.max_steps} steps' if pskd.interval else f'{pskd.max_epochs} epochs'
            logger.warning(may_end_early('PSKD', pskd.alpha, training, stops))
        return pskd

    def place(self, trainer: pl.Trainer, batch_idx: int) -> None:
        data = self._data
        assert data is not None  # an epoch begins
        if self.method.interval:
            data.epoch = data.done() // self.method.interval
        elif self._by_steps:  # resumed with another batch size it is in another epoch
            data.epoch = trainer.global_step // self._steps
        if batch_idx and not self._saved:
            self.method.resume_without_past(mid_period=True)

    def _length(self, trainer: pl.Trainer) -> Dict[str, Any]:
        """How long the training will be, in epochs, or with ``interval`` in steps."""
        self._by_steps = False
        if trainer.fast_dev_run:  # a look whether it runs, with the tap; it learns from no past
            return dict(max_epochs=2, interval=None)
        if self._settings['interval'] and len(trainer.optimizers) > 1:
            raise ValueError(
                f'PSKD: interval= counts steps of the optimizer, and the Trainer counts those of all '
                f'{len(trainer.optimizers)} optimizers, so when training ends is not known: leave out interval'
            )
        if self._settings['interval'] and trainer.estimated_stepping_batches not in (math.inf, -1):
            return dict(max_steps=trainer.estimated_stepping_batches)
        epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
        if trainer.max_steps != -1 and trainer.num_training_batches != math.inf:
            steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            by_steps, self._steps = math.ceil(trainer.max_steps / steps), steps
            self._by_steps, epochs = by_steps < epochs, min(by_steps, epochs)
        if epochs == math.inf:
            how = 'set max_epochs or max_steps of the Trainer'
            if trainer.max_steps != -1:
                how = 'set max_epochs, or limit_train_batches to a number, which is an epoch then'
            raise ValueError(f'PSKD: alpha grows up to the last epoch, which is not known: {how}')
        return dict(max_epochs=epochs)

    def state_dict(self) -> Dict[str, Any]:
        if self.method is not None:
            self.method.synchronize()  # Lightning asks in all processes
        return super().state_dict()
