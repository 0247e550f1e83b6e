"""The label of each training sample: it tells when the samples of a batch are not those of its rows."""

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from .transfer import to_host

__all__ = ['NO_LABEL', 'RowLabels']

UNKNOWN = -(2**31)
STEPS = 256  # a soft label's mean class id is kept in steps of 1 / 256
NO_LABEL = UNKNOWN // STEPS  # a class id that is compared with nothing


class RowLabels:
    """A label per row of a table; a sample that comes with another label than its row has is refused.

    A data loader names rows by what its sampler drew. Whatever sorts, drops, retries or replaces samples after that
    gives a row to another sample, and so does another data set in a resumed run. The labels show it.

    Kept of a label: a class id, or the mean class id of a soft label, 4 bytes a row.

    Args:
        num_samples: number of rows, N.
        labels: class ids ``[N]`` that are known beforehand; by default each row keeps the label it is first seen with.

    Example:
        >>> rows = RowLabels(4)
        >>> rows.check(torch.tensor([2, 0]), torch.tensor([7, 5]))
        >>> rows.check(torch.tensor([0, 2]), torch.tensor([5, 7]))
        >>> rows.check(torch.tensor([0, 2]), torch.tensor([7, 5]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: the sample of row 0 had the label 5 before, and has the label 7 now (2 of 2 rows differ): ...
    """

    def __init__(self, num_samples: int, labels: Optional[Tensor] = None):
        self.num_samples = num_samples
        # What is kept of each row's label, int32 [N]; None as long as none is known.
        self.kept: Optional[Tensor] = None if labels is None else _fingerprints(torch.as_tensor(labels, device='cpu'))
        # On their way from an accelerator, oldest first: (rows, what is kept of their labels, event, way out).
        self._pending: List[Tuple[Tensor, Tensor, Optional[torch.cuda.Event], str]] = []

    def check(self, indices: Tensor, target: Tensor, *, way_out: str = '') -> None:
        """Compares the labels of samples with those of their rows, and keeps those of rows that are new.

        Labels on an accelerator are copied to the host without waiting for them, so that a difference is an error a
        step or two later.

        Args:
            indices: rows, integers ``[B]``, on the CPU.
            target: class ids ``[B]``, or soft labels ``[B, C]``.
            way_out: the end of the message, as ``"use teacher='snapshot'"``.

        Raises:
            ValueError: a sample has another label than its row, or ``target`` has another length than ``indices``.
        """
        if target.dim() not in (1, 2) or len(target) != len(indices):
            raise ValueError(f'target: needs a label for each of {len(indices)} samples, got {tuple(target.shape)}')
        (labels,), event = to_host(_fingerprints(target.detach()))
        self._pending.append((indices.long(), labels, event, way_out))
        self.land()

    def land(self, wait: bool = False) -> None:
        """Compares what has arrived; with ``wait`` all that is on its way."""
        while self._pending:
            indices, labels, event, way_out = self._pending[0]
            if event is not None:
                if not (wait or event.query()):
                    return
                event.synchronize()
            del self._pending[0]
            self.compare(indices, labels, way_out)

    def of(self, indices: Tensor) -> Tensor:
        """What is kept of the labels of rows, int32 ``[B]``, for ``compare`` of another process."""
        unknown = (len(indices),), UNKNOWN
        return torch.full(*unknown, dtype=torch.int32, device='cpu') if self.kept is None else self.kept[indices]

    def compare(self, indices: Tensor, labels: Tensor, way_out: str = '') -> None:
        """As ``check``, with what is kept of labels (of another process, say)."""
        old = self.of(indices)
        known = (old != UNKNOWN) & (labels != UNKNOWN)
        differ = known & ((old.long() - labels.long()).abs() > 1)  # a soft label may be rounded another way
        if differ.any():
            first = int(differ.nonzero()[0])
            raise ValueError(
                f'the sample of row {int(indices[first])} had the label {_named(old[first])} before, and has the label '
                f'{_named(labels[first])} now ({int(differ.sum())} of {len(differ)} rows differ): the samples of a '
                'batch are not those that the sampler chose, in its order, so each would be taught with another '
                'sample. Does the collate function, the data set or the loop sort, drop or replace samples, or was '
                f'training resumed with another data set? Leave the samples as they are{way_out and ", or " + way_out}'
            )
        if self.kept is None:
            self.kept = torch.full((self.num_samples,), UNKNOWN, dtype=torch.int32, device='cpu')
        self.kept[indices] = torch.where(labels == UNKNOWN, old, labels)

    def state(self) -> Optional[Tensor]:
        """All there is to save: what is kept, or None."""
        self.land(wait=True)
        return None if self.kept is None else self.kept.clone()

    def load(self, state: Optional[Tensor]) -> None:
        """Restores ``state`` of a table of as many rows."""
        self._pending.clear()
        self.kept = None if state is None else state.clone()


def _fingerprints(target: Tensor) -> Tensor:
    if target.dim() == 2:
        classes = torch.arange(target.shape[1], dtype=torch.float64, device=target.device)
        return (target.double() @ classes * STEPS).round().to(torch.int32)
    return (target.long() * STEPS).to(torch.int32)


def _named(label: Tensor) -> str:
    return f'{int(label) / STEPS:g}'
