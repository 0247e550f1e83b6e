"""Which samples are in a batch of the Trainer's loader, and beside them their partners."""

from collections import deque
from typing import Callable, Iterable, List, MutableMapping, Optional

import torch
from torch.utils.data import DataLoader, IterableDataset

from selfkd.teacher import random_state
from selfkd_torch import Batches
from selfkd_torch.noting import NotingSampler

__all__ = ['PARTNERS', 'ROWS', 'draw_partners', 'first_batch', 'labels_of', 'number', 'why_no_index']

ROWS = 'selfkd_rows'  # the entry of a batch that says which samples it holds
PARTNERS = 'selfkd_partners'  # the entry that is the batch of their partners
INSIDE = 'selfkd_inside'  # the attribute of a numbered data set that is the data set
LABELS = ('labels', 'label', 'label_ids')  # of a sample; collators call them labels


def why_no_index(loader) -> Optional[str]:
    loader = _base(loader)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return None
    kind = type(getattr(loader, 'dataset', loader)).__name__
    return f'the training data come from a {kind}, whose samples have no index'


def number(loader, method: str, way_out: str) -> DataLoader:
    """Has the loader, which the Trainer trains with, put the rows of the samples into its batches. A loader of the same
    data set, for [`selfkd_torch.Batches`][].

    It may come from a ``get_train_dataloader`` of the user's own. Data set, collate function and (for partners) batch
    sampler are all that is exchanged, so sampler, workers and what Accelerate has made of the loader stay.
    """
    obstacle = why_no_index(loader)
    if obstacle:
        raise ValueError(f'{method}: {obstacle}: {way_out}')
    loader = _base(loader)
    dataset = loader.dataset
    if isinstance(dataset, _Numbered):  # of a loader that is used again
        dataset = vars(dataset)[INSIDE]
    else:
        collate = _Collate(loader.collate_fn, loader.batch_sampler is not None)
        vars(loader).update(dataset=_Numbered(dataset), collate_fn=collate)
    return DataLoader(dataset, batch_size=None if loader.batch_sampler is None else 1)


def draw_partners(loader, data: Batches) -> None:
    """Has the numbered loader put a batch of the samples' partners into each of its batches."""
    loader = _base(loader)
    sampler = loader.batch_sampler
    if isinstance(sampler, NotingSampler):  # of a loader that is used again
        sampler = sampler._sampler
    # Nothing is noted: rows come with their batch.
    vars(loader)['batch_sampler'] = NotingSampler(sampler, data, deque(maxlen=0))
    vars(loader)['collate_fn'].paired = True


def first_batch(loader):
    """What the loader's collate function makes of the first sample. Nothing random is drawn by this."""
    loader = _base(loader)
    dataset, collate = loader.dataset, loader.collate_fn
    if isinstance(dataset, _Numbered):
        dataset, collate = vars(dataset)[INSIDE], collate.collate
    with random_state(0, torch.device('cpu')):
        sample = next(iter(dataset)) if isinstance(dataset, IterableDataset) else dataset[0]
        return collate(sample if loader.batch_size is None and loader.batch_sampler is None else [sample])


def labels_of(dataset) -> Optional[List]:
    """Of all samples; None: they have none. A data set without columns is gone through once."""
    targets = getattr(dataset, 'targets', None)
    if targets is not None:
        return targets
    plain = dataset.with_format(None) if hasattr(dataset, 'with_format') else dataset  # without transforms
    columns: Iterable = getattr(plain, 'column_names', None) or ()
    column = next((name for name in LABELS if name in columns), None)
    if column:
        return list(plain[column])
    with random_state(0, torch.device('cpu')):  # a look must not change what the samples to come draw
        first = dataset[0]
        name = next((name for name in LABELS if name in first), None)
        return [dataset[i][name] for i in range(len(dataset))] if name else None


def _base(loader):
    return getattr(loader, 'base_dataloader', loader)  # that of Accelerate's wrapping


class _Numbered:
    """A data set whose samples come with their indices. What is set on it is set on the data set."""

    def __init__(self, dataset):
        vars(self)[INSIDE] = dataset

    def __len__(self) -> int:
        return len(vars(self)[INSIDE])

    def __getitem__(self, index):
        return index, vars(self)[INSIDE][index]

    def __getitems__(self, indices: List) -> List:
        dataset = vars(self)[INSIDE]
        several = getattr(dataset, '__getitems__', None)
        return list(zip(indices, several(indices) if several else [dataset[index] for index in indices]))

    def __getattr__(self, name: str):
        if INSIDE not in vars(self):  # a copy that is being made
            raise AttributeError(name)
        return getattr(vars(self)[INSIDE], name)

    def __setattr__(self, name: str, value) -> None:
        setattr(vars(self)[INSIDE], name, value)


class _Collate:
    """The loader's own collate function, and beside what it makes of the samples their rows (and partners)."""

    def __init__(self, collate: Callable, batched: bool):
        self.collate, self.batched, self.paired = collate, batched, False

    def __call__(self, samples):
        indices, features = zip(*samples) if self.batched else samples
        if not self.batched:
            batch = self._checked(features)
        else:
            half = len(features) // 2 if self.paired else len(features)
            batch = self._checked(list(features[:half]))
            if self.paired:
                batch[PARTNERS] = self._checked(list(features[half:]))
        batch[ROWS] = [int(index) for index in indices]  # a list: neither pinned nor moved to the accelerator
        return batch

    def _checked(self, features) -> MutableMapping:
        batch = self.collate(features)
        if not isinstance(batch, MutableMapping):
            raise ValueError(f'selfkd_transformers: the collator must give a dict, got {type(batch).__name__}')
        return batch
