"""Makes the prediction banks of all processes equal, moving only the rows that were written."""

from typing import List

import torch
import torch.distributed as dist
from torch import Tensor

from .bank import PredictionBank, _last_of_each

__all__ = ['exchange_rows']

CHUNK = 16384  # rows in flight at a time


def exchange_rows(bank: PredictionBank, indices: Tensor, steps: Tensor) -> None:
    """Gives every process the rows that any of them wrote since the last exchange. Collective: call it in all.

    Where several ranks wrote a sample, the row of the latest step stays, and within a step the highest rank's: what a
    single process would hold that trained on the ranks' batches put together. Rows travel as the bank stores them
    (float16 or top-k), over torch.distributed's default group: gloo, NCCL, or both. With one process, or where
    torch.distributed is not in use, there is nothing to do.

    Args:
        bank: this rank's, holding its own rows.
        indices: samples this rank wrote, int64 ``[M]``, M may differ between ranks. Those whose rows were not finite,
            and that the bank therefore does not know, are left out.
        steps: the step each was written in, int64 ``[M]``.

    Raises:
        ValueError: ``indices`` and ``steps`` differ in length, or two ranks saw a row with different labels.
    """
    if indices.shape != steps.shape:
        raise ValueError(f'steps: must be one for each of {len(indices)} indices, got {len(steps)}')
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    known = bank.seen(indices)
    indices, steps = indices.cpu().long()[known], steps.cpu().long()[known]
    keep = _last_of_each(indices)
    bank.labels.land(wait=True)
    columns = (indices[keep], steps[keep], bank.labels.of(indices[keep]).long())
    written = _all_gather_ragged(torch.stack(columns, dim=1), bank.device)
    owner = torch.cat([torch.full((len(rows),), rank, device='cpu') for rank, rows in enumerate(written)])
    everything = torch.cat(written)
    bank.labels.compare(everything[:, 0], everything[:, 2].int())  # and keeps those of the other ranks
    order = everything[:, 1].sort(stable=True).indices  # by step; within one, by rank
    winners = order[_last_of_each(everything[order, 0])]
    indices_of = [everything[winners[owner[winners] == rank], 0].sort().values for rank in range(len(written))]
    rank = dist.get_rank()
    for start in range(0, max(len(rows) for rows in indices_of), CHUNK):
        chunks = [rows[start : start + CHUNK] for rows in indices_of]
        gathered = [_all_gather_ragged(rows, bank.device) for rows in bank.read_encoded(chunks[rank])]
        for other, chunk in enumerate(chunks):
            if other != rank:
                bank.write_encoded(chunk, tuple(rows[other].to(bank.device) for rows in gathered))


def _all_gather_ragged(rows: Tensor, device: torch.device) -> List[Tensor]:
    """Every rank's tensor ``[M, k]``, of the same k; on the CPU."""
    lengths = [int(length) for length in _all_gather(torch.tensor([len(rows)], device='cpu'), device)]
    if not any(lengths):
        return [rows] * len(lengths)
    padded = rows.new_zeros(max(lengths), rows.shape[1])
    padded[: len(rows)] = rows
    # As bytes: neither gloo nor NCCL takes int16, the class ids of top-k rows.
    gathered = _all_gather(padded.view(torch.uint8), device)
    return [tensor.view(rows.dtype)[:length] for tensor, length in zip(gathered, lengths)]


def _all_gather(tensor: Tensor, device: torch.device) -> List[Tensor]:
    """Every rank's tensor of one shape and dtype, on the CPU; on the way on the device that the group works on.

    NCCL's is the bank's ``device``. With the bank on the CPU it is the current one, which NCCL wants set anyway.
    """
    of_nccl = device if device.type == 'cuda' else 'cuda'
    tensor = tensor.to(of_nccl if dist.get_backend() == 'nccl' else 'cpu')
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor)
    return [t.cpu() for t in tensors]
