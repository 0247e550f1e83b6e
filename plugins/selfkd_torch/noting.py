"""A DataLoader once more, that notes which samples are in the batches it gives."""

import operator
from collections import deque
from typing import Any, Callable, Iterator, Optional

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

__all__ = ['Noting', 'NotingSampler']

# Samplers that draw (number of the sample, something else), and data sets which take that.
WITH_NUMBER_FIRST = ('ScheduledBatchSampler',)


class Noting(DataLoader):
    """The loader ``source``, whose batches' rows (and partners) are put into ``batches.noted``.

    Args:
        batches: the [`Batches`][selfkd_torch.Batches] that want them.
        source: the user's loader. What is set on the one is set on the other.
    """

    _batches: Any
    _source: DataLoader
    _drawn: deque

    def __init__(self, batches, source: DataLoader):  # not DataLoader's own: it has what the source has
        vars(self).update(_batches=batches, _source=source, _drawn=deque())
        self._follow()

    def _follow(self) -> None:
        """Takes over what the source has now; the workers that persist are its own."""
        kept = {name: vars(self).get(name) for name in ('_batches', '_source', '_drawn', '_iterator')}
        vars(self).update(vars(self._source))
        vars(self).update(kept)
        name = 'sampler' if self._source.batch_sampler is None else 'batch_sampler'
        vars(self)[name] = NotingSampler(vars(self)[name], self._batches, self._drawn)
        if self._batches.pairing is not None:
            vars(self)['collate_fn'] = _Halves(self._source.collate_fn)

    def __setattr__(self, name: str, value) -> None:
        vars(self)[name] = value
        if not name.startswith('_'):
            setattr(self._source, name, value)

    def __iter__(self) -> Iterator:  # type: ignore[override]  # torch's names a private class of iterators
        self._follow()
        self._batches.noted.clear()
        self._drawn.clear()
        return map(self._note, _Steps(super().__iter__(), self._drawn))  # the seeds are drawn now, as the loader's are

    def _note(self, drawn):
        (rows, partners), batch = drawn
        if self._batches.pairing is not None:
            batch, others = batch
            partners = partners, others
        self._batches.noted.append((rows, partners))
        return batch


class _Steps:
    """What was drawn for a batch, beside the batch; where a batch fails, what was drawn for it goes with it."""

    def __init__(self, batches: Iterator, drawn: deque):
        self.batches, self.drawn = batches, drawn

    def __iter__(self) -> '_Steps':
        return self

    def __next__(self):
        try:
            batch = next(self.batches)
        except StopIteration:
            raise
        except Exception:
            if self.drawn:
                self.drawn.popleft()
            raise
        return self.drawn.popleft(), batch


class NotingSampler(Sampler):
    """A sampler, of samples or batches, that notes what it draws; for pairs a partner of each sample as well."""

    def __init__(self, sampler, batches, drawn: deque):
        self._sampler, self._batches, self._drawn = sampler, batches, drawn

    def __iter__(self) -> Iterator:
        pairing, way_out = self._batches.pairing, self._batches.way_out
        generator = self._batches.partners_generator()
        beside = type(self._sampler).__name__ in WITH_NUMBER_FIRST  # each number comes with something else
        for indices in self._sampler:
            rows = _rows([drawn[0] for drawn in indices] if beside else indices, way_out)
            partners = None
            if pairing is not None:
                partners = pairing.draw(rows, generator)
                others = partners.tolist()
                indices = [*indices, *([(n, *drawn[1:]) for n, drawn in zip(others, indices)] if beside else others)]
            self._drawn.append((rows, partners))
            yield indices

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str):  # a batch sampler's sampler, which may have a set_epoch
        if name == '_sampler':
            raise AttributeError(name)
        return getattr(self._sampler, name)


def _rows(indices, way_out: Optional[str]) -> Tensor:
    try:
        indices = indices.reshape(-1) if isinstance(indices, Tensor) else indices
        numbers = [operator.index(index) for index in (indices if hasattr(indices, '__iter__') else [indices])]
        return torch.tensor(numbers, device='cpu')
    except TypeError:
        raise ValueError(
            f'the sampler draws {indices!r:.100} for a batch, which are not the numbers of samples (a size beside each '
            f'of them, a key?), so the rows of the samples are not known: {way_out}'
        ) from None


class _Halves:
    """The loader's own collate function, for the samples and for their partners."""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, samples):
        samples, half = list(samples), len(samples) // 2
        return self.collate(samples[:half]), self.collate(samples[half:])
