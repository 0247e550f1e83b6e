"""A data loader's own batches, and beside each of them which samples it holds."""

from collections import deque
from typing import Callable, Iterator, List

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from selfkd.pairing import SameClassPairing
from selfkd.seeds import step_generator

__all__ = ['Batches', 'Numbered', 'unwrap']

OPTIONS = ('num_workers', 'pin_memory', 'timeout', 'worker_init_fn', 'multiprocessing_context', 'generator')
OPTIONS += ('prefetch_factor', 'persistent_workers', 'pin_memory_device', 'in_order')


class Batches:
    """What ``batches()`` of a method gives: iterated, the loader's own batches, one epoch each time.

    The row of each sample, its index in the loader's data set, travels with its batch: through workers, prefetching and
    any sampler, beside what the loader's own collate function makes of the samples. Data set, collate function
    and model stay as they are. For all else it is the loader: its length and attributes.

    Args:
        loader: a DataLoader; of an IterableDataset, or not a DataLoader at all, for methods that need no rows.
    """

    def __init__(self, loader):
        self.loader, self.methods = loader, []
        self.epoch, self.step = 0, 0  # both count from 0; the epoch under way, or the next one
        self._numbered, self.pairing, self._seed = None, None, 0
        self.noted = deque()  # rows and partners of the batches handed out and not yet trained on, oldest first

    def number(self, method: str) -> None:
        """Asks for the rows of the samples. ValueError: the loader cannot give them."""
        way_out = "use teacher='snapshot', which needs no rows" if method == 'PSKD' else 'use a map-style data set'
        if not isinstance(self.loader, DataLoader) or type(self.loader).__iter__ is not DataLoader.__iter__:
            raise ValueError(
                f'{method}: loader must be a torch DataLoader, got {type(self.loader).__name__}, whose batches come '
                f'from an __iter__ of its own, so the samples in them are not known: {way_out}'
            )
        if isinstance(self.loader.dataset, IterableDataset):
            raise ValueError(f'{method}: the data set is an IterableDataset, whose samples have no index: {way_out}')
        self._numbered = True if self._numbered is None else self._numbered

    def pair(self, method: str, pairing: SameClassPairing, seed: int) -> None:
        """Asks for a partner of each sample, which come as a batch of their own."""
        self.number(method)
        if self.loader.batch_sampler is None:
            raise ValueError(f'{method}: the loader has batch_size=None: partners need a batch sampler')
        self.pairing, self._seed = pairing, seed

    def lend(self):
        """The loader, or one like it that notes which rows its batches hold: for a loop that is not ours."""
        if self._numbered is True:
            loader = self.loader
            sampler = dict(batch_size=None, sampler=loader.sampler)
            if loader.batch_sampler is not None:
                anchors = loader.batch_sampler
                sampler = dict(batch_sampler=_PairSampler(anchors, self) if self.pairing else anchors)
            options = {name: getattr(loader, name) for name in OPTIONS if hasattr(loader, name)}
            collate = _Collate(loader.collate_fn, loader.batch_sampler is not None, self.pairing is not None)
            self._numbered = _Noting(Numbered(loader.dataset), collate_fn=collate, **sampler, **options)
            self._numbered.noted = self.noted
        return self._numbered or self.loader

    def replace(self, loader) -> None:
        """From now on the batches are those of this loader, over the same data set."""
        self.loader, self._numbered = loader, self._numbered and True

    def __iter__(self) -> Iterator:
        loader, finished = self.lend(), False
        self.begin_epoch()
        try:
            for batch in loader:
                self.begin_step()
                yield batch
                self.end_step()
            finished = True
        finally:
            self.end_epoch(finished)

    # What an epoch consists of. A loop that is not ours (Lightning's, ...) calls these in its own places.

    def begin_epoch(self) -> None:
        for method in self.methods:
            method.begin_epoch()

    def begin_step(self) -> None:
        rows, partners = self.noted.popleft() if self._numbered else (None, None)
        for method in self.methods:
            method.begin_step(rows, partners)

    def end_step(self) -> None:
        for method in self.methods:
            method.end_step()
        self.step += 1

    def end_epoch(self, finished: bool) -> None:
        self.epoch += 1
        for method in self.methods:
            method.end_epoch(finished)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str):
        if name == 'loader':
            raise AttributeError(name)
        return getattr(self.loader, name)

    def state_dict(self) -> dict:
        return {'epoch': self.epoch, 'step': self.step}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.step = state['epoch'], state['step']


class _Noting(DataLoader):
    """Gives the batches, and notes what else :class:`_Collate` made."""

    def __iter__(self) -> Iterator:
        self.noted.clear()
        return map(self._note, super().__iter__())  # not a generator: the seeds are drawn now, as the loader's own are

    def _note(self, item):
        rows, batch, partners = item
        self.noted.append((rows, partners))
        return batch


class Numbered:
    """A data set whose samples come with their indices."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        return index, self.dataset[index]

    def __getitems__(self, indices: List) -> List:
        several = getattr(self.dataset, '__getitems__', None)
        return list(zip(indices, several(indices) if several else [self.dataset[index] for index in indices]))

    def __getattr__(self, name: str):  # a worker_init_fn may look at the data set
        if name == 'dataset':
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _Collate:
    """The loader's own collate function, between rows and (for pairs) partners."""

    def __init__(self, collate: Callable, batched: bool, pairs: bool):
        self.collate, self.batched, self.pairs = collate, batched, pairs

    def __call__(self, data):
        if not self.batched:
            return _rows(data[0]), self.collate(data[1]), None
        indices, samples = zip(*data)
        samples = list(samples)
        if not self.pairs:
            return _rows(indices), self.collate(samples), None
        half = len(indices) // 2
        return _rows(indices[:half]), self.collate(samples[:half]), self.collate(samples[half:])


def _rows(indices) -> Tensor:
    try:
        return torch.as_tensor([int(index) for index in indices])
    except TypeError:
        return torch.as_tensor(indices).reshape(-1)


class _PairSampler(BatchSampler):
    """B anchors, as the loader's batch sampler gives them, then B partners."""

    def __init__(self, anchors: BatchSampler, batches: Batches):
        self.anchors, self.batches = anchors, batches

    def __iter__(self) -> Iterator[List[int]]:
        generator = step_generator(self.batches._seed, self.batches.epoch)
        for anchors in self.anchors:
            anchors = list(anchors)
            yield anchors + self.batches.pairing.draw(anchors, generator).tolist()

    def __len__(self) -> int:
        return len(self.anchors)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, '_orig_mod', None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner
