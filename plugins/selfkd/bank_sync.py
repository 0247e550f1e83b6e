"""Makes the prediction banks of all processes equal, moving only the rows that were written."""

from typing import List

import torch
import torch.distributed as dist
from torch import Tensor

from .bank import PredictionBank

__all__ = ['exchange_rows']

SLICE = 2**19  # rows of the bank that are compared at a time
BYTES = 2**25  # of all ranks' rows in flight at a time


def exchange_rows(bank: PredictionBank) -> None:
    """Gives every process the rows that any of them wrote since the last exchange. Collective: call it in all.

    Where several ranks wrote a sample, the row of the latest step stays, and within a step the highest rank's: what a
    single process would hold that trained on the ranks' batches put together. Rows travel as the bank stores them
    (float16 or top-k), over torch.distributed's default group: gloo, NCCL, or both. With one process, or where
    torch.distributed is not in use, there is nothing to do.

    A slice of the bank is done at a time, so that beside the bank it takes some 100 MB, however large the bank is.

    Args:
        bank: this rank's, holding its own rows.

    Raises:
        ValueError: two ranks saw a row with different labels.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    bank.labels.land(wait=True)
    written = bank.written()
    starts = range(0, len(written), SLICE)
    latest = torch.stack([written[start : start + SLICE].amax() for start in starts])
    for start, anywhere in zip(starts, _largest(latest, bank.device).tolist()):
        if anywhere:
            _exchange_slice(bank, torch.arange(start, min(start + SLICE, len(written))), written)
    written.zero_()


def _exchange_slice(bank: PredictionBank, rows: Tensor, written: Tensor) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    labels = bank.labels.of(rows)
    # The smallest of a row's labels must be its largest. That a label is not known is the least int32, and stays so.
    largest, negative = _largest(torch.stack([labels, -labels]), bank.device)
    differ = (labels != largest) | (-negative != largest)
    for anywhere in (-negative, largest):  # compared with this rank's, and with one another; and kept
        bank.labels.compare(rows[differ], anywhere[differ])
    last = _largest(written[rows[0] : rows[-1] + 1].long() * world + rank, bank.device)  # by step, then by rank
    winner = last.remainder(world).masked_fill_(last < world, -1)
    rows_of = [rows[winner == other] for other in range(world)]
    length = max(1, BYTES // (bank.storage.row_bytes * world))
    for start in range(0, max(map(len, rows_of)), length):
        chunks = [rows[start : start + length] for rows in rows_of]
        longest = max(map(len, chunks))
        tables = [_all_gather(table, longest, bank.device) for table in bank.read_encoded(chunks[rank])]
        for other, chunk in enumerate(chunks):
            if other != rank:
                bank.write_encoded(chunk, tuple(table[other][: len(chunk)] for table in tables))


def _largest(numbers: Tensor, device: torch.device) -> Tensor:
    """Of all ranks, element by element; on the CPU."""
    numbers = numbers.to(_of_group(device))
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.cpu()


def _all_gather(rows: Tensor, length: int, device: torch.device) -> List[Tensor]:
    """Every rank's tensor ``[M, k]``, of the same k, filled up to ``[length, k]``."""
    padded = torch.zeros(length, rows.shape[1], dtype=rows.dtype, device=_of_group(device))
    padded[: len(rows)] = rows
    # As bytes: neither gloo nor NCCL takes int16, the class ids of top-k rows.
    tables = [torch.empty_like(padded).view(torch.uint8) for _ in range(dist.get_world_size())]
    dist.all_gather(tables, padded.view(torch.uint8))
    return [table.view(rows.dtype) for table in tables]


def _of_group(device: torch.device) -> torch.device:
    """The device that the process group works on. NCCL's is the bank's ``device``; with the bank on the CPU it is the
    current one, which NCCL wants set anyway."""
    if dist.get_backend() != 'nccl':
        return torch.device('cpu')
    return device if device.type == 'cuda' else torch.device('cuda')
