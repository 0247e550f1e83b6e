"""Past predictions, a row per training sample: PS-KD's p_past as a table."""

from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor

from .memory import free_memory, processes_sharing
from .row_labels import RowLabels
from .storage import Storage
from .topk import TopK, draw_top_k
from .transfer import to_device, to_host

__all__ = ['PredictionBank', 'draw_top_k']


class PredictionBank:
    """The probabilities that a network last gave for each training sample.

    Not a module, and not part of any model: buffers of a model are averaged, copied and cast by EMA, DDP and
    mixed-precision machinery. Save it beside the model with ``state_dict``.

    Sample indices are integers in [0, num_samples), each the same sample all through training. Pass them as a
    CPU tensor, as a data loader gives them: which rows are known is book-kept on the CPU, so that neither reading nor
    writing waits for the accelerator.

    Rows that are not finite are not written: the row that was there stays, known or not. On the CPU, where looking is
    free, they are an error; rows of an accelerator (a float16 step that overflowed, which GradScaler skips) are counted
    in ``skipped``.

    Args:
        num_samples: number of rows, N.
        num_classes: C.
        top_k: keep only the k largest probabilities and their class ids of a row, and spread the rest of its mass
            evenly over the other classes. ImageNet takes 0.1 GB with ``top_k=16`` instead of 5.1 GB.
        dtype: how probabilities are stored: ``'float32'`` (exact), ``'float16'``, or ``'log8'``, a byte each, in steps
            of 4 %, rounded at random such that they are right on average (``selfkd.storage``).
        device: where the table lives. With the table on the CPU and probabilities on an accelerator, rows written are
            copied over in the background.

    Raises:
        ValueError: arguments out of range.
        MemoryError: the table would take more than half of the device's free memory.

    Example:
        >>> bank = PredictionBank(num_samples=4, num_classes=3)
        >>> bank.write(torch.tensor([2, 0]), torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]))
        >>> bank.read(torch.tensor([2]))
        tensor([[0.2000, 0.5000, 0.3000]])
        >>> bank.seen(torch.tensor([0, 1]))
        tensor([ True, False])
        >>> bank.nbytes  # 4 rows of 3 floats, and a flag a row
        52
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        top_k: Optional[int] = None,
        dtype: Union[str, torch.dtype] = 'float32',
        device: Union[str, torch.device] = 'cpu',
    ):
        if num_samples < 1:
            raise ValueError(f'num_samples: must be at least 1, got {num_samples}')
        self.storage = Storage(num_classes, top_k=top_k, dtype=dtype)
        self.num_samples, self.num_classes, self.top_k = num_samples, num_classes, top_k
        self.device = torch.device(device)
        self._refuse_if_too_large(num_samples * self.storage.row_bytes)
        shapes = self.storage.tables.values()
        self._tables = tuple(torch.zeros(num_samples, columns, dtype=d, device=self.device) for d, columns in shapes)
        self._seen = torch.zeros(num_samples, dtype=torch.bool, device='cpu')
        # As written() says, since the last exchange; None until the first write in one of several processes.
        self._written: Optional[Tensor] = None
        # What is on its way from an accelerator, oldest first: (indices, rows, for each 1 if finite + 2 if given,
        # step, event). With the table on the accelerator there are no rows.
        self._pending: List[Tuple[Tensor, Tuple[Tensor, ...], Tensor, int, Optional[torch.cuda.Event]]] = []
        self._skipped = 0
        self.labels = RowLabels(num_samples)

    def _refuse_if_too_large(self, nbytes: int) -> None:
        free, processes = free_memory(self.device), processes_sharing(self.device)
        if free is None or nbytes * processes <= free / 2:
            return
        each = f' in each of {processes} processes' if processes > 1 else ''
        raise MemoryError(
            f'PredictionBank: {self.num_samples} x {self.num_classes} probabilities take {nbytes / 2**30:.1f} GiB'
            f'{each}, more than half of the {free / 2**30:.1f} GiB free on {self.device}: '
            f'{" or ".join(self.storage.smaller())}'
        )

    def check_labels(self, indices: Tensor, target: Tensor, *, way_out: str = "use teacher='snapshot'") -> None:
        """Refuses samples that are not those of their rows; call it before ``read`` and ``write``.

        Args:
            indices: ``[B]``.
            target: the samples' class ids ``[B]``, or soft labels ``[B, C]``.
            way_out: end of the message, in the words of the caller.

        Raises:
            ValueError: a sample has another label than it had when its row was first written
                ([`RowLabels`][selfkd.row_labels.RowLabels]); labels on an accelerator are compared a step or two later.
        """
        self.labels.check(self._check_indices(indices), target, way_out=way_out)

    def read(self, indices: Tensor, *, return_seen: bool = False):
        """Past predictions of samples.

        Args:
            indices: ``[B]``.
            return_seen: also return which rows are known, as ``seen``; rows that are not come as the uniform
                distribution. Otherwise an unknown row is an error.

        Returns:
            probs ``[B, C]``, float32, on the bank's device; with ``return_seen`` the pair (probs, seen ``[B]`` bool on
            the CPU), so that ``pskd_loss(logits, labels, probs, alpha * seen)`` trains new samples on their labels
            alone.

        Raises:
            KeyError: a row was never written and ``return_seen`` is false.
            IndexError: an index outside the table.
        """
        rows, seen = self._read_rows(indices, return_seen)
        probs = rows.dense(self.num_classes) if isinstance(rows, TopK) else rows
        return (probs, seen) if return_seen else probs

    def read_top_k(self, indices: Tensor, *, return_seen: bool = False):
        """As ``read``, as [`TopK`][selfkd.topk.TopK] without widening the rows. For banks with ``top_k``."""
        if not self.top_k:
            raise ValueError('top_k: this bank keeps whole rows (top_k=None), use read()')
        rows, seen = self._read_rows(indices, return_seen)
        return (rows, seen) if return_seen else rows

    def _read_rows(self, indices: Tensor, allow_unseen: bool) -> Tuple[Union[Tensor, TopK], Tensor]:
        indices = self._check_indices(indices)
        self._land(indices)
        seen = self._seen[indices]
        if not allow_unseen and not seen.all():
            first = indices[~seen][:5].tolist()
            raise KeyError(f'PredictionBank: rows {first} were never written; pass return_seen=True to allow for it')
        rows = self.storage.decode(self._stored(indices))
        if seen.all():
            return rows, seen
        unseen = to_device(~seen, self.device)[:, None]
        if isinstance(rows, TopK):  # distinct ids with the uniform probability
            ids = torch.where(unseen, torch.arange(rows.classes.shape[1], device=self.device), rows.classes)
            return TopK(rows.values.masked_fill(unseen, 1 / self.num_classes), ids), seen
        return rows.masked_fill(unseen, 1 / self.num_classes), seen

    @torch.no_grad()
    def write(
        self, indices: Tensor, probs: Union[Tensor, TopK], *, given: Optional[Tensor] = None, step: int = 0
    ) -> None:
        """Replaces the rows of samples; where an index comes twice, the last of its rows stays.

        Args:
            indices: ``[B]``.
            probs: ``[B, C]``, any floating dtype, on any device; or [`TopK`][selfkd.topk.TopK] with the bank's
                ``top_k``.
            given: which of the rows are to be replaced, bool ``[B]``, on the device of ``probs``. By default all.
            step: of the training, another one each time that a row is written: random rounding follows from it, and
                which of several processes' rows stays ([`exchange_rows`][selfkd.bank_sync.exchange_rows]).

        Raises:
            ValueError: shapes that do not match; on the CPU, where looking is free, rows that are not distributions or
                not finite.
            IndexError: an index outside the table.
        """
        indices, finite = self._check_indices(indices), self.storage.check(probs)
        if len(finite) != len(indices):
            raise ValueError(f'probs: must have a row for each of {len(indices)} indices, got {len(finite)}')
        if len(indices) == 0:
            return
        last, rows = _last_of_each(indices), self.storage.encode(probs, indices, step)
        if len(last) < len(indices):
            there = to_device(last, finite.device)
            indices, finite, rows = indices[last], finite[there], tuple(row[there] for row in rows)
            given = given if given is None else given[there]
        if finite.device.type != 'cpu':
            self._write_later(indices, rows, finite, given, step)
            return
        if given is not None:
            indices, rows = indices[given], tuple(row[given] for row in rows)
        self.write_encoded(indices, rows)  # the storage has looked at them
        self._note_written(indices, step)

    def _note_written(self, indices: Tensor, step: int) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._steps()[indices] = step + 1

    def _steps(self) -> Tensor:
        if self._written is None:
            self._written = torch.zeros(self.num_samples, dtype=torch.int32, device='cpu')
        return self._written

    def written(self) -> Tensor:
        """1 + the step in which this process last wrote each row, int32 ``[N]``, and 0 for rows that it did not write.

        Book-kept where training is in several processes. [`selfkd.bank_sync.exchange_rows`][] sets it to 0.
        """
        self._land()
        return self._steps()

    def _write_later(
        self, indices: Tensor, rows: Tuple[Tensor, ...], finite: Tensor, given: Optional[Tensor] = None, step: int = 0
    ) -> None:
        """Takes rows of an accelerator without waiting for it: whether they are finite is known when they arrive."""
        self._land(indices[:0])
        given = torch.ones_like(finite) if given is None else given
        arriving = rows
        if self.device.type != 'cpu':
            where, here = to_device(indices, self.device), (finite & given).to(self.device)[:, None]
            rows = tuple(row.to(self.device) for row in rows)
            self._put(where, tuple(torch.where(here, row, old) for row, old in zip(rows, self._stored(where))))
            arriving = ()
        (state, *arrived), event = to_host((finite + 2 * given).to(torch.uint8), *arriving)
        self._pending.append((indices, tuple(arrived), state, step, event))

    def write_encoded(self, indices: Tensor, rows: Tuple[Tensor, ...]) -> None:
        """Takes over rows as ``read_encoded`` gave them, each index once; of another process, say."""
        indices = self._check_indices(indices)
        self._land(indices)
        self._put(indices, rows)
        self._seen[indices] = True

    def read_encoded(self, indices: Tensor) -> Tuple[Tensor, ...]:
        """Known rows as they are stored, for ``write_encoded`` of another process's bank."""
        indices = self._check_indices(indices)
        self._land(indices)
        return self._stored(indices)

    def _stored(self, indices: Tensor) -> Tuple[Tensor, ...]:
        where = to_device(indices, self.device)
        return tuple(table[where] for table in self._tables)

    def _put(self, indices: Tensor, rows: Tuple[Tensor, ...]) -> None:
        where = to_device(indices, self.device)
        for table, row in zip(self._tables, rows):
            table[where] = row.to(self.device)

    def _land(self, wanted: Optional[Tensor] = None) -> None:
        """Takes in what has arrived; waits for what is under way only if it is of a wanted sample (None: of any)."""
        last = -1
        for i, (indices, *_, event) in enumerate(self._pending):
            arrived = event is None or event.query()
            if arrived or wanted is None or bool(torch.isin(wanted, indices).any()):
                last = i
        # In order: the newest row of a sample stays.
        for indices, rows, state, step, event in self._pending[: last + 1]:
            if event is not None:
                event.synchronize()
            good = state == 3
            if not good.all():
                self._skipped += int((state == 2).sum())
                indices, rows = indices[good], tuple(row[good] for row in rows)
            self._put(indices, rows)
            self._seen[indices] = True
            self._note_written(indices, step)
        del self._pending[: last + 1]

    @property
    def skipped(self) -> int:
        """Rows that were not written because they are not finite, since the bank was made: for logs.

        Of what has arrived from the accelerator so far: looking does not wait.
        """
        self._land(torch.zeros(0, dtype=torch.long, device='cpu'))
        return self._skipped

    def seen(self, indices: Tensor) -> Tensor:
        """Whether a prediction of each sample is known: bool ``[B]``, on the CPU."""
        indices = self._check_indices(indices)
        self._land(indices)
        return self._seen[indices]

    def __len__(self) -> int:
        return self.num_samples

    @property
    def nbytes(self) -> int:
        """Bytes that the table takes, its flags included."""
        tables = [*self._tables, self._seen, *(t for t in (self.labels.kept, self._written) if t is not None)]
        return sum(t.numel() * t.element_size() for t in tables)

    def state_dict(self, *, copy: bool = True) -> Dict[str, Any]:
        """Everything there is to save: CPU tensors and numbers, loadable with ``weights_only=True``.

        ``copy=False``: rows of a table on the CPU are not copied, and change with the bank. For a state that is written
        to a file at once.
        """
        self._land()
        tables = {name: table.to('cpu', copy=copy) for name, table in zip(self.storage.tables, self._tables)}
        state = {'num_classes': self.num_classes, 'dtype': self.storage.name, 'seen': self._seen.clone(), **tables}
        labels = self.labels.state()
        return state if labels is None else {**state, 'labels': labels}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restores ``state_dict`` of a bank with the same settings.

        Raises:
            ValueError: the saved bank has other rows, classes, ``top_k`` or dtype, or is damaged.
        """
        saved = {'num_samples': len(state['values']), **self.storage.settings_of(state)}
        for name, own in {'num_samples': self.num_samples, **self.storage.settings()}.items():
            if saved[name] != own:
                raise ValueError(
                    f'PredictionBank: the saved bank has {name}={saved[name]}, this one {name}={own}: resume with the '
                    'settings and the training set of the saved run, or load its weights without resuming'
                )
        self._refuse_if_damaged(state)
        self._pending.clear()
        self._written = None
        for name, table in zip(self.storage.tables, self._tables):
            table.copy_(state[name])
        self._seen.copy_(state['seen'])
        self.labels.load(state.get('labels'))  # banks that were saved before labels were kept have none

    def _refuse_if_damaged(self, state: Dict[str, Any]) -> None:
        """copy_() would spread a column over the table, and what is not finite would be taught."""
        saved = tuple(state[name] for name in self.storage.tables)
        flags = [state['seen'], state.get('labels', self._seen)]
        own_shapes = [table.shape for table in (*self._tables, self._seen, self._seen)]
        for rows, shape in zip([*saved, *flags], own_shapes):
            if rows.shape != shape:
                raise ValueError(
                    f'PredictionBank: the saved bank is damaged: it has a table {tuple(rows.shape)}, and needs '
                    f'{tuple(shape)}: resume from another checkpoint'
                )
        if saved[0].dtype != self._tables[0].dtype or self.storage.is_damaged(saved):
            raise ValueError(
                'PredictionBank: the saved bank is damaged: it holds probabilities of another type or that are not '
                'finite, or class ids out of range: resume from another checkpoint'
            )

    def _check_indices(self, indices: Tensor) -> Tensor:
        if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(f'indices: must be integers [B], got {indices.dtype}, {tuple(indices.shape)}')
        indices = indices.cpu().long()
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.num_samples):
            raise IndexError(
                f'indices: must lie in [0, num_samples={self.num_samples}), got values from {indices.min().item()} to '
                f'{indices.max().item()}'
            )
        return indices


def _last_of_each(indices: Tensor) -> Tensor:
    """Positions of the last occurrence of each value, ascending."""
    values, inverse = torch.unique(indices, return_inverse=True)
    if len(values) == len(indices):
        return torch.arange(len(indices), device='cpu')
    positions = torch.arange(len(indices), device='cpu')
    last = torch.zeros(len(values), dtype=torch.long, device='cpu').scatter_reduce_(0, inverse, positions, 'amax')
    return last.sort().values
