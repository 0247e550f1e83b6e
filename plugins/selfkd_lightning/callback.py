"""What the callbacks have in common: the Trainer's batches, and the loss that ``training_step`` computes."""

from contextlib import ExitStack
from typing import Any, Callable, Dict, List, Optional

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage
from torch import nn

from selfkd_torch import Batches
from selfkd_torch.words import in_words

__all__ = ['WAY_IN', 'WORDS', 'MethodCallback', 'TrainersBatches']

WAY_IN = (
    'training_step must compute it by F.cross_entropy or F.nll_loss; a loss module that is written another way is '
    "named, as {}(loss='criterion')"
)
WORDS = {  # what selfkd_torch calls it, and what it is here
    ' with model=, which': ', which',
    r'\(a loop over batches\(\)\)': "(one of the Trainer's)",
    r'give max_steps=$': 'set limit_train_batches to a number',
    r'\bset outputs=, or compute its loss outside': "compute its loss outside, or use teacher='bank'",
    r'\bset outputs=': 'name the module that gives the logits, as model="net"',
    r', by what outputs= gives of each': '',
    r'as tap\(criterion\)': "as loss='criterion'",
}


class TrainersBatches(Batches):
    """Batches that the Trainer trains on."""

    trainer: pl.Trainer

    def done(self) -> int:
        return self.trainer.global_step

    def check_epoch_ends(self, method: str, steps: Optional[int] = None) -> None:
        """The Trainer says how long an epoch is."""


class MethodCallback(pl.Callback):
    """A method of ``selfkd_torch`` over a LightningModule. The first of these callbacks goes through the batches for
    all of them.

    Args:
        loss: name of the sub-module that computes the loss, or None.
        model: name of the sub-module that computes the logits, or None.
    """

    name = ''
    method: Any = None  # selfkd_torch's, while there is training
    adds = True  # a term, to what others made of the loss
    by_rows = False  # whether it knows samples by their rows

    def __init__(self, loss: Optional[str], model: Optional[str]):
        self._loss, self._model = loss, model
        self._data: Optional[TrainersBatches] = None
        self._saved: Dict[str, Any] = {}
        self._state: Any = None  # the Trainer's
        self._in_step = self._in_epoch = False  # whether training_step, and an epoch, are under way
        self._updates = 0  # of the optimizer, that the methods know of

    # What a method says of itself.

    def prepare(self, data: TrainersBatches) -> None:
        """Before the first batch: asks for rows or partners."""

    def make(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """The method, over ``self._data``."""
        raise NotImplementedError

    def place(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """An epoch begins, or is gone on with: says which one in ``self._data.epoch``."""

    # What the Trainer calls.

    def _all(self, trainer: pl.Trainer) -> List['MethodCallback']:
        """The methods in use, that which changes the cross-entropy before those which add to it."""
        return sorted((c for c in trainer.callbacks if isinstance(c, MethodCallback)), key=lambda c: c.adds)

    def _leads(self, trainer: pl.Trainer) -> bool:
        return self is self._all(trainer)[0]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._state = trainer.state
        if stage != 'fit':
            return
        if getattr(pl_module, '_compiler_ctx', None):
            raise ValueError(
                f'{self.name}: torch.compile of the whole LightningModule hides its loss: compile the network inside, '
                'as self.net = torch.compile(net)'
            )
        if self.method is not None:  # fit is called once more
            self._saved, self.method = (self.method.state_dict() if trainer.current_epoch else {}), None
        self._data = None
        if not self._leads(trainer):
            return
        strategy = trainer.strategy
        self._release(strategy)
        process = strategy.process_dataloader  # comes after Lightning has put its sampler into the loader
        strategy.process_dataloader = lambda loader: process(self._noting(trainer, loader))
        step = strategy.training_step
        strategy.training_step = lambda *args, **kwargs: self._tapped(trainer, step, *args, **kwargs)

    @staticmethod
    def _release(strategy) -> None:
        for name in ('process_dataloader', 'training_step'):
            vars(strategy).pop(name, None)

    def _tapped(self, trainer: pl.Trainer, step: Callable, *args, **kwargs):
        """A training step, and nothing beside it: what hooks and other callbacks compute stays plain."""
        callbacks = self._all(trainer)
        try:
            with in_words(WORDS), ExitStack() as stack:
                for callback in callbacks:
                    callback._in_step = True
                    stack.enter_context(callback.tap(trainer.lightning_module))
                return step(*args, **kwargs)
        finally:
            for callback in callbacks:
                callback._in_step = False

    def tap(self, pl_module: nn.Module):
        return self.method.tap(pl_module.get_submodule(self._loss) if self._loss else None)

    def _noting(self, trainer: pl.Trainer, loader):
        """The loader of the training data, so that it notes which samples are in its batches."""
        if trainer.state.stage != RunningStage.TRAINING:
            return loader
        data = self._data
        if data is None:
            data = TrainersBatches(loader)
            data.trainer = trainer
            for callback in self._all(trainer):
                callback._data = data
                with in_words(WORDS):
                    callback.prepare(data)
        elif self.method is None:
            raise ValueError(self._one_loader())
        else:
            needs = any(callback.by_rows for callback in self._all(trainer))
            if needs and loader.dataset is not data.loader.dataset:
                raise ValueError(
                    f'{self.name}: reload_dataloaders_every_n_epochs brought another data set, to which the rows of '
                    f'samples do not belong: {data.way_out}, or give the loader the same data set each time'
                )
            data.replace(loader)
        return data.lend()

    def _one_loader(self) -> str:
        return f'{self.name}: the training data must come from one DataLoader (of a ConcatDataset)'

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._leads(trainer):
            return
        data = self._data
        if data is None or trainer.train_dataloader is not data.lend():
            raise ValueError(self._one_loader())
        self._updates, data.epoch = trainer.global_step, trainer.current_epoch
        for callback in self._all(trainer):
            with in_words(WORDS):
                callback.method = callback.make(trainer, pl_module)
            callback.method.way_in = WAY_IN.format(callback.name)

    def network(self, pl_module: nn.Module) -> nn.Module:
        """The sub-module that computes the logits.

        Raises:
            ValueError: it is not named, and there are several.
        """
        return pl_module.get_submodule(self.network_name(pl_module))

    def network_name(self, pl_module: nn.Module) -> str:
        found = [name for name, child in pl_module.named_children() if next(child.parameters(), None) is not None]
        if self._model is None and len(found) != 1:
            raise ValueError(
                f'{self.name}: it needs the module that computes the logits, but there are {found}: name it, as '
                'model="net" (several can be put into an nn.Sequential)'
            )
        return self._model or found[0]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch, batch_idx: int) -> None:
        data = self._data
        if not self._leads(trainer) or data is None:
            return
        if not self._in_epoch:  # Lightning leaves on_train_epoch_start out when it resumes within an epoch
            data.epoch, self._in_epoch = trainer.current_epoch, True
            for callback in self._all(trainer):
                callback.place(trainer, batch_idx)
            data.begin_epoch()
        if data.way_out and not data.noted:
            raise ValueError(
                f'{self.name}: training_step(dataloader_iter) fetches batches by itself: take a batch, or use PSKD '
                "with teacher='snapshot'"
            )
        if data.pairing is not None:  # partners go the way of the batch, through the module's hooks
            rows, (partner_rows, partners) = data.noted[0]
            partners = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(partners))
            data.noted[0] = rows, (partner_rows, trainer.strategy.batch_to_device(partners))
        data.begin_step(batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        data = self._data
        if not self._leads(trainer) or data is None:
            return
        if batch is None:  # Lightning has skipped it
            data.noted and data.noted.popleft()
            return
        data.end_step()
        if trainer.global_step != self._updates:
            self._updates = trainer.global_step
            data.after_update()
        for callback in self._all(trainer):
            pl_module.log_dict(callback.method.logs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._in_epoch and self._data is not None:
            self._in_epoch = False
            self._data.end_epoch(True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, 'fit')

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release(trainer.strategy)
        self._in_epoch = False

    def state_dict(self) -> Dict[str, Any]:
        return self._saved if self.method is None else self.method.state_dict()

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._saved = state
        if self.method is not None:
            self.method.load_state_dict(state)
