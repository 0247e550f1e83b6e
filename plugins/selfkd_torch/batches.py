"""A data loader's own batches, and beside each of them which samples it holds."""

import logging
import sys
from collections import deque
from contextlib import contextmanager
from typing import Any, Deque, Iterator, Optional, Tuple

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from selfkd.pairing import SameClassPairing
from selfkd.seeds import step_generator

from .noting import Noting

__all__ = ['Batches', 'Method', 'length_of']

logger = logging.getLogger(__name__)

PREFETCHER = 'PrefetchLoader'  # timm's
# Loaders that hand the batches of a DataLoader inside on, one for one and in its order, and where that is.
WRAPPERS = {'_FabricDataLoader': '_dataloader', 'DataLoaderShard': 'base_dataloader', PREFETCHER: 'loader'}
# Loaders that hand on something else, and the setting that makes them.
SETTINGS = {'MultiEpochsDataLoader': "leave out timm's --use-multi-epochs-loader"}
UNSHARDED = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)
# An epoch that goes over the data more often than this is none.
PASSES = 10
LONG = 10_000  # batches of an epoch that no length says the end of


class Batches:
    """What ``batches()`` of a method gives: iterated, the loader's own batches, one epoch each time.

    The row of each sample, its index in the loader's data set, is noted when the loader's sampler draws it, and batches
    come in the order in which they are drawn, whatever workers do. Data set, collate function and model stay as they
    are. For all else it is the loader: its length and attributes, which a loop may also set.

    An epoch counts when it is finished, or, broken off after batches were trained on, when another one begins: a look
    at a batch is no epoch. One iterator at a time: what is drawn belongs to the latest.

    Args:
        loader: a DataLoader; of an IterableDataset, or not a DataLoader at all, for methods that need no rows. One that
            Fabric or Accelerate has prepared, and timm's PrefetchLoader, serve as well.
    """

    _made = False

    def __init__(self, loader):
        self.loader, self.methods = loader, []
        self.epoch, self.step = 0, 0  # both count from 0; the epoch under way, or the next one
        self.steps_per_epoch: Optional[int] = None  # for a training that is counted in steps: how long an epoch is
        self.trained = False  # whether the epoch under way had a loss
        # Rows and partners of the batches handed out and not yet trained on, oldest first.
        self.noted: Deque[Tuple[Any, Any]] = deque()
        self.pairing: Optional[SameClassPairing] = None
        self.seed, self._iterating = 0, False  # the partners'
        self._ending: Optional[str] = None  # the method that counts epochs
        self.way_out: Optional[str] = None  # of a loader whose rows are needed; None: they are not
        self._noting: Optional[Noting] = None
        self._made = True

    @property
    def _wrapper(self) -> Optional[str]:
        """The attribute in which the loader has the DataLoader whose batches it hands on."""
        known = [WRAPPERS[kind.__name__] for kind in type(self.loader).__mro__ if kind.__name__ in WRAPPERS]
        return next((name for name in known if isinstance(vars(self.loader).get(name), DataLoader)), None)

    @property
    def _inner(self):
        """The DataLoader that makes the batches."""
        return vars(self.loader)[self._wrapper] if self._wrapper else self.loader

    def why_not_numbered(self) -> Optional[str]:
        """Why the loader cannot give the rows of the samples; None: it can."""
        loader = self._inner
        if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
            return (
                f'the loader is a {type(loader).__name__}, whose batches do not come from the __iter__ of a torch '
                'DataLoader, so the samples in them are not known'
            )
        if isinstance(loader.dataset, IterableDataset):
            return 'the data set is an IterableDataset, whose samples have no index'
        if not getattr(loader, 'in_order', True):
            return 'with in_order=False of the loader it is not known which samples a batch holds'
        return None

    def number(self, method: str, way_out: str) -> None:
        """Asks for the rows of the samples. ValueError: the loader cannot give them."""
        obstacle = self.why_not_numbered()
        if obstacle:
            setting = SETTINGS.get(type(self._inner).__name__)
            raise ValueError(f'{method}: {obstacle}: {setting + ", or " if setting else ""}{way_out}')
        self.way_out = way_out

    def pair(self, method: str, pairing: SameClassPairing, seed: int) -> None:
        """Asks for a partner of each sample, which come as a batch of their own."""
        self.number(method, 'use a map-style data set, and a torch DataLoader with in_order=True')
        if self._inner.batch_sampler is None:
            raise ValueError(f'{method}: the loader has batch_size=None: partners need a batch sampler')
        if type(self.loader).__name__ == PREFETCHER:
            raise ValueError(
                f"{method}: timm's {PREFETCHER} normalizes batches after they are collated, which the partners' would "
                'not be: use --no-prefetcher (create_loader(use_prefetcher=False))'
            )
        self.pairing, self.seed = pairing, seed

    def partners_generator(self) -> torch.Generator:
        """Draws the partners of one loop over the loader."""
        return step_generator(self.seed, self.epoch)

    def count_steps(self, method: str) -> int:
        """From now on an epoch is one pass over the data, counted in steps of all processes together.

        ValueError: how many steps that takes is not known.
        """
        loader, size = self.loader, length_of(getattr(self.loader, 'dataset', None))
        each = getattr(loader, 'total_batch_size', None)  # Accelerate's, of all processes
        if each is None:
            each = getattr(loader, 'batch_size', None) or getattr(loader.batch_sampler, 'batch_size', None)
            each = each and each * _world_size()
        by_samples = -(-size // each) if size and each else None
        known = [steps for steps in (by_samples, length_of(loader)) if steps]
        if not known:
            raise ValueError(
                f'{method}: max_steps needs to know how many batches a pass over the data takes: give the data set a '
                '__len__ (and the batch sampler a batch_size), or use max_epochs'
            )
        self.steps_per_epoch = min(known)
        return self.steps_per_epoch

    def check_epoch_ends(self, method: str, steps: Optional[int] = None) -> None:
        """ValueError: an epoch of so many steps (by default what the loader says) goes over the data too often."""
        self._ending = method
        size, each = length_of(getattr(self.loader, 'dataset', None)), getattr(self.loader, 'batch_size', None) or 1
        steps = steps or length_of(self.loader)
        if size and steps and steps * each > PASSES * max(size, each):
            raise ValueError(
                f'{method}: one loop over the loader goes over the data {steps * each // size} times (a sampler with '
                'replacement?), and what acts from the second epoch on would not act before: say how many batches the '
                'training takes, max_steps= in place of max_epochs=, and an epoch is one pass over the data'
            )
        if size is None and steps == LONG and self.epoch == 0 and length_of(self.loader) is None:
            logger.warning('%s: plain up to now: the first epoch has not ended after %d batches', method, steps)

    def lend(self):
        """The loader, or one like it that notes which rows its batches hold: for a loop that is not ours."""
        if not self.way_out:
            return self.loader
        if self._noting is None:
            self._noting = Noting(self, self._inner)
        return self._noting

    def replace(self, loader) -> None:
        """From now on the batches are those of this loader, over the same data set."""
        self.loader, self._noting = loader, None

    def __iter__(self) -> Iterator:
        if self._iterating:
            raise RuntimeError(
                'batches(): an iterator over them is not finished yet, and a second one would take its samples: go '
                'through one after the other (del the first, or end its loop by break)'
            )
        self._check_prepared()
        if self.steps_per_epoch:
            self.epoch = self._epoch_of_steps()
        elif self.trained:  # the last epoch was broken off, and training goes on with another
            self.epoch += 1
        self._iterating, self.trained, finished = True, False, False
        try:
            with self._lent() as loader:
                self.begin_epoch()
                for count, batch in enumerate(loader, 1):
                    if self._ending:
                        self.check_epoch_ends(self._ending, count)
                    self.begin_step(batch)
                    yield batch
                    self.end_step()
                    self.after_update()
                finished = True
        finally:
            self._iterating = False
            if any(method.used for method in self.methods):  # a break after the loss
                self.end_step()
                self.after_update()
            self.end_epoch(finished)

    @contextmanager
    def _lent(self):
        """The loader to iterate over: ours, or a wrapper's with ours inside."""
        lent, name = self.lend(), self._wrapper
        if lent is self.loader or name is None:
            yield lent
            return
        inner = vars(self.loader)[name]
        vars(self.loader)[name] = lent
        try:
            yield self.loader
        finally:
            vars(self.loader)[name] = inner

    def _check_prepared(self) -> None:
        """ValueError: under Accelerate each of several processes would train on all data."""
        accelerate: Any = sys.modules.get('accelerate')
        state = accelerate and accelerate.PartialState._shared_state
        if not state or accelerate.PartialState().num_processes < 2 or type(self.loader) is not DataLoader:
            return
        if type(self.loader.sampler) in UNSHARDED and type(self.loader.batch_sampler) in (BatchSampler, type(None)):
            raise ValueError(
                'batches(): accelerator.prepare() leaves them as they are, so that each process would train on all '
                'data: prepare the loader first, as loader = accelerator.prepare(loader), and make PSKD(loader, ...) '
                'with what it gives'
            )

    # What an epoch consists of. A loop that is not ours (Lightning's, ...) calls these in its own places.

    def begin_epoch(self) -> None:
        for method in self.methods:
            method.begin_epoch()

    def begin_step(self, batch=None) -> None:
        if self.steps_per_epoch and self._epoch_of_steps() > self.epoch:
            self.end_epoch(True)  # the loop goes on in the next one
            self.begin_epoch()
        rows, partners = self.noted.popleft() if self.way_out else (None, None)
        for method in self.methods:
            method.begin_step(rows, partners, batch)

    def end_step(self) -> None:
        self.step += 1
        self.trained = self.trained or any(method.used for method in self.methods)
        for method in self.methods:
            method.end_step()

    def after_update(self) -> None:
        for method in self.methods:
            method.after_update()

    def end_epoch(self, finished: bool) -> None:
        for method in self.methods:
            method.end_epoch(finished)
        if finished:
            self.epoch = self._epoch_of_steps() if self.steps_per_epoch else self.epoch + 1
            self.trained = False

    def done(self) -> int:
        """What ``steps_per_epoch`` counts: batches, or in a toolkit's loop the steps of its optimizer."""
        return self.step

    def _epoch_of_steps(self) -> int:
        assert self.steps_per_epoch is not None  # it is asked of a training that is counted in steps only
        return self.done() // self.steps_per_epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str):
        if name == 'loader':
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value) -> None:
        if self._made and name not in vars(self) and not hasattr(type(self), name) and hasattr(self.loader, name):
            setattr(self.loader, name, value)  # as timm's script sets mixup_enabled
        else:
            super().__setattr__(name, value)

    def state_dict(self) -> dict:
        return {'epoch': self.epoch, 'step': self.step, 'trained': self.trained and not self._iterating}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.step, self.trained = state['epoch'], state['step'], state.get('trained', False)


class Method:
    """What goes with batches: it counts those that were trained on without it.

    Args:
        loader: a loader, or another method's ``batches()``.

    Raises:
        ValueError: the batches have one of this name already.
    """

    name, call, way_in = '', '', ''  # as 'PSKD', 'pskd.loss(logits, target)', 'use it in place of ...'
    learns_labels = False  # whether its term holds a cross-entropy of the labels, with the loss's own options

    def __init__(self, loader):
        self.data = loader if isinstance(loader, Batches) else Batches(loader)
        if any(method.name == self.name for method in self.data.methods):
            raise ValueError(f'{self.name}: these batches have a {self.name} already: one is enough')
        self.used = 0  # losses of the batch under way
        self._begun: Optional[int] = None  # the epoch that began last
        self._batches = self._plain = 0  # of that epoch

    def batches(self) -> Batches:
        """The loader's own batches; iterate over it once in every epoch."""
        return self.data

    def begin_epoch(self) -> bool:
        """Whether it is another epoch than that which began last."""
        new = self._begun != self.data.epoch
        if new:
            self._begun, self._batches, self._plain = self.data.epoch, 0, 0
        elif self._batches >= (length_of(self.data.loader) or LONG):  # broken off again and again
            self._refuse_if_plain()
        return new

    def begin_step(self, rows: Optional[Tensor], partners, batch) -> None:
        self.used = 0

    def end_step(self) -> None:
        self._batches += 1
        self._plain += not self.used
        self.used = 0

    def after_update(self) -> None:
        """The loop is through with a batch, its step of the optimizer included."""

    def synchronize(self) -> None:
        """All processes together, before a checkpoint is saved."""

    def resume_without_past(self, mid_period: bool) -> None:
        """Training goes on from a checkpoint that holds nothing of the method, within a period or at the end of one."""

    def end_epoch(self, finished: bool) -> None:
        if not finished:
            return
        self._refuse_if_plain()
        if self._plain:
            logger.warning(
                '%s: %d of %d batches of epoch %d were trained on without %s, or skipped',
                *(self.name, self._plain, self._batches, self.data.epoch + 1, self.call),
            )

    def _refuse_if_plain(self) -> None:
        if self._batches and self._plain == self._batches:
            raise RuntimeError(
                f'{self.name}: a batch was trained on without {self.call}, so with the plain loss, and so were all '
                f'{self._batches} of the epoch: {self.way_in}. (To look at the data, go through the loader itself.)'
            )


def _world_size() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def length_of(sized) -> Optional[int]:
    try:
        return len(sized)
    except (TypeError, NotImplementedError, AttributeError):
        return None
