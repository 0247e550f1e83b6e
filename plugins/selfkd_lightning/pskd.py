"""PS-KD as a callback of Lightning's Trainer."""

import logging
import math
from typing import Any, Callable, Dict, Optional, Tuple, Union

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
from selfkd_torch import Batches
from selfkd_torch.words import in_words

__all__ = ['PSKD']

logger = logging.getLogger(__name__)

WAY_IN = (
    'training_step must compute it by F.cross_entropy or F.nll_loss; a loss module that is written another way is '
    "named, as PSKD(loss='criterion'), and the callback's loss(logits, target) says it outright"
)
WAY_OUT = "use teacher='snapshot', which needs no rows"
WORDS = {  # what selfkd_torch calls it, and what it is here
    ' with model=, which': ', which',
    r'\(a loop over batches\(\)\)': "(one of the Trainer's)",
    r'give max_steps=$': 'set limit_train_batches to a number',
    r'\bset outputs=, or compute its loss outside': "compute its loss outside, or use teacher='bank'",
    r'\bset outputs=': 'name the module that gives the logits, as model="net"',
    r', by what outputs= gives of each': '',
}


class _Batches(Batches):
    """Batches that the Trainer trains on."""

    trainer: pl.Trainer

    def done(self) -> int:
        return self.trainer.global_step

    def check_epoch_ends(self, method: str, steps: Optional[int] = None) -> None:
        """The Trainer says how long an epoch is."""


class PSKD(pl.Callback):
    """Progressive self-knowledge distillation in every ``training_step``.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    ``Trainer(max_epochs=90, callbacks=[selfkd_lightning.PSKD(alpha=0.8)])`` softens the cross-entropy that
    ``training_step`` computes by what was predicted for the same samples in the last epoch. Which samples a batch holds
    is noted when the loader makes it. Past predictions go into Lightning's checkpoints.

    Args:
        alpha, teacher, teacher_mode, keep_hard, top_k, bank_dtype, bank_device, bank_momentum, num_classes: as of
            :class:`selfkd_torch.PSKD`.
        interval, ema_decay: likewise, by steps of the optimizer (``trainer.global_step``).
        loss: name of the sub-module that computes the loss, as ``'criterion'``, where that is not torch's
            cross-entropy; see :func:`selfkd_torch.PSKD.tap`.
        model: for a copy: name of the sub-module that computes the logits; by default the only one with parameters.

    Logged besides the loss, in every step: ``pskd_alpha``, ``pskd_hard``, ``pskd_soft``, ``pskd_entropy``.
    The number of epochs is the Trainer's ``max_epochs``, or what its ``max_steps`` come to.

    Raises:
        ValueError: for settings that cannot work or would never act, here or when ``fit`` begins.
        RuntimeError: a training step without a loss that could be softened.
    """

    @renamed(dtype='bank_dtype', device='bank_device')
    def __init__(
        self,
        alpha: float = 0.8,
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
        self.teacher, self._loss, self._model = teacher, loss, model
        self.pskd: Optional[selfkd_torch.PSKD] = None
        self._data: Optional[Batches] = None
        self._saved: Dict[str, Any] = {}
        self._state: Any = None  # the Trainer's
        self._in_step = self._by_steps = False  # whether training_step is under way; whether max_steps ends training
        self._updates = 0  # of the optimizer, that the past knows of

    def loss(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        """In place of ``F.cross_entropy``, for those who rather say it themselves. In validation and testing it is
        ``F.cross_entropy``, so that a step may be shared.

        Raises:
            RuntimeError: in training, but outside ``training_step``; or without a Trainer that has this callback.
        """
        if self._in_step:
            return self._under_way()[0].loss(logits, target, **options)
        if self._state is None or self._state.stage in (None, RunningStage.TRAINING):
            raise RuntimeError('PSKD: the loss is for training_step, under a Trainer that has this callback')
        return F.cross_entropy(logits, target, **options)

    def _under_way(self) -> Tuple[selfkd_torch.PSKD, Batches]:
        """The method and its batches, which are there once training has begun."""
        assert self.pskd is not None
        assert self._data is not None
        return self.pskd, self._data

    @property
    def current_alpha(self) -> float:
        """Share of the past prediction in the epoch under way."""
        return self.pskd.current_alpha if self.pskd else 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._state = trainer.state
        if stage != 'fit':
            return
        strategy = trainer.strategy
        self._release(strategy)
        self._whole = type(strategy) in (DDPStrategy, SingleDeviceStrategy)
        if self.teacher in ('snapshot', 'ema') and not self._whole:
            raise ValueError(
                f"PSKD: under {type(strategy).__name__} no process has the whole model to copy: use teacher='bank'"
            )
        if getattr(pl_module, '_compiler_ctx', None):
            raise ValueError(
                'PSKD: torch.compile of the whole LightningModule hides its loss: compile the network inside, as '
                'self.net = torch.compile(net)'
            )
        if self.pskd is not None:  # fit is called once more
            self._saved, self.pskd = (self.pskd.state_dict() if trainer.current_epoch else {}), None
        self._data = None
        process = strategy.process_dataloader  # comes after Lightning has put its sampler into the loader
        strategy.process_dataloader = lambda loader: process(self._noting(trainer, loader))
        step = strategy.training_step
        strategy.training_step = lambda *args, **kwargs: self._softened(pl_module, step, *args, **kwargs)

    @staticmethod
    def _release(strategy) -> None:
        for name in ('process_dataloader', 'training_step'):
            vars(strategy).pop(name, None)

    def _softened(self, pl_module: nn.Module, step: Callable, *args, **kwargs):
        """A training step, and nothing beside it: what hooks and other callbacks compute stays plain."""
        module = pl_module.get_submodule(self._loss) if self._loss else None
        self._in_step = True
        try:
            with in_words(WORDS), self._under_way()[0].tap(module, check=False):
                return step(*args, **kwargs)
        finally:
            self._in_step = False

    def _noting(self, trainer: pl.Trainer, loader):
        """The loader of the training data, so that it notes which samples are in its batches."""
        if trainer.state.stage != RunningStage.TRAINING:
            return loader
        data = self._data
        if self.pskd is None or data is None:  # neither is there without the other
            self._data = data = _Batches(loader)
            data.trainer = trainer
        elif self.pskd.kind in ('auto', 'bank') and loader.dataset is not data.loader.dataset:
            raise ValueError(
                'PSKD: reload_dataloaders_every_n_epochs brought another data set, to which the rows of the bank do '
                "not belong: use teacher='snapshot', or give the loader the same data set each time"
            )
        else:
            data.replace(loader)
        if self.teacher == 'bank' or (self.teacher == 'auto' and not data.why_not_numbered()):
            data.number('PSKD', WAY_OUT)
        return data.lend()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._data is None or trainer.train_dataloader is not self._data.lend():
            raise ValueError('PSKD: the training data must come from one DataLoader (of a ConcatDataset)')
        options, call = {**self._settings, **self._length(trainer)}, 'a cross-entropy'
        if self.teacher == 'auto' and not self._whole:
            options['teacher'] = choose_teacher('auto', None)
        elif self.teacher != 'bank':
            name = self._network(pl_module)
            options['model'] = pl_module.get_submodule(name) if name else None
            if self.teacher != 'auto':
                call += f' of the logits that {type(pl_module).__name__}.{name} gives (another module: model="name")'
        with in_words(WORDS):
            self.pskd = selfkd_torch.PSKD(self._data, **options)
        self.pskd.call, self.pskd.way_in, self._updates = call, WAY_IN, trainer.global_step
        if self._saved:
            self.pskd.load_state_dict(self._saved)
        stops = ['max_steps'] if trainer.max_steps != -1 and trainer.num_training_batches == math.inf else []
        stops += ['EarlyStopping'] if trainer.early_stopping_callbacks else []
        if any(isinstance(callback, Timer) and callback.time_remaining() is not None for callback in trainer.callbacks):
            stops.append('max_time')
        if stops and self.pskd.alpha and trainer.is_global_zero:
            training = f'{self.pskd.max_steps} steps' if self.pskd.interval else f'{self.pskd.max_epochs} epochs'
            logger.warning(may_end_early('PSKD', self.pskd.alpha, training, stops))

    def _length(self, trainer: pl.Trainer) -> Dict[str, Any]:
        """How long the training will be, in epochs, or with ``interval`` in steps."""
        self._by_steps = False
        if trainer.fast_dev_run:  # a look whether it runs, with the tap; it learns from no past
            return dict(max_epochs=2, interval=None)
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

    def _network(self, pl_module: nn.Module) -> Optional[str]:
        """The name of the sub-module that computes the logits; None if it is not known, and may not be needed."""
        if self._model is not None:
            return self._model
        found = [name for name, child in pl_module.named_children() if next(child.parameters(), None) is not None]
        if len(found) != 1:
            if self.teacher == 'auto':
                return None
            raise ValueError(
                f'PSKD: teacher={self.teacher!r} copies the module that computes the logits, but there are {found}: '
                'name it, as model="net" (several can be put into an nn.Sequential)'
            )
        return found[0]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch, batch_idx: int) -> None:
        pskd, data = self._under_way()
        if not pskd._inside:  # Lightning leaves on_train_epoch_start out when it resumes within an epoch
            data.epoch = trainer.current_epoch
            if pskd.interval:
                data.epoch = data.done() // pskd.interval
            elif self._by_steps:  # resumed with another batch size it is in another epoch
                data.epoch = trainer.global_step // self._steps
            if batch_idx and not self._saved:
                pskd.resume_without_past(mid_period=True)
            data.begin_epoch()
        if data.way_out and not data.noted:
            raise ValueError(
                "PSKD: training_step(dataloader_iter) fetches batches by itself: take a batch, or teacher='snapshot'"
            )
        data.begin_step()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        pskd, data = self._under_way()
        if batch is None:  # Lightning has skipped it
            data.noted and data.noted.popleft()
            return
        data.end_step()
        if trainer.global_step != self._updates:
            self._updates = trainer.global_step
            data.after_update()
        pl_module.log_dict(pskd.logs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pskd, data = self._under_way()
        if pskd._inside:
            data.end_epoch(True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, 'fit')

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release(trainer.strategy)

    def state_dict(self) -> Dict[str, Any]:
        if self.pskd is None:
            return self._saved
        self.pskd.synchronize()  # Lightning asks in all processes
        return self.pskd.state_dict()

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._saved = state
        if self.pskd is not None:
            self.pskd.load_state_dict(state)
