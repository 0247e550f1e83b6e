"""Makes the prediction banks of all ranks equal, moving only the rows that were written."""

from typing import List

import torch
from mmengine import dist
from torch import Tensor

from selfkd.bank import PredictionBank, _last_of_each

__all__ = ['exchange_rows']

CHUNK = 16384  # rows in flight at a time


def exchange_rows(bank: PredictionBank, indices: Tensor, steps: Tensor) -> None:
    """Gives every rank the rows that any rank wrote since the last exchange. Collective: call it on all ranks.

    Where several ranks wrote a sample, the row of the latest step stays, and within a step the highest rank's: what a
    single process would hold that trained on the ranks' batches put together. Rows travel as the bank stores them
    (float16 or top-k).

    Args:
        bank: this rank's, holding its own rows.
        indices: samples this rank wrote, int64 ``[M]``, M may differ between ranks.
        steps: the step each was written in, int64 ``[M]``.
    """
    if dist.get_world_size() == 1:
        return
    keep = _last_of_each(indices)
    mine = torch.stack([indices[keep], steps[keep]], dim=1)
    written = _all_gather_ragged(mine)
    owner = torch.cat([torch.full((len(rows),), rank) for rank, rows in enumerate(written)])
    everything = torch.cat(written)
    order = everything[:, 1].sort(stable=True).indices  # by step; within one, by rank
    winners = order[_last_of_each(everything[order, 0])]
    indices_of = [everything[winners[owner[winners] == rank], 0].sort().values for rank in range(len(written))]
    rank = dist.get_rank()
    for start in range(0, max(len(rows) for rows in indices_of), CHUNK):
        chunks = [rows[start : start + CHUNK] for rows in indices_of]
        gathered = [_all_gather_ragged(rows) for rows in bank.read_encoded(chunks[rank])]
        for other, chunk in enumerate(chunks):
            if other != rank:
                bank.write_encoded(chunk, tuple(rows[other].to(bank.device) for rows in gathered))


def _all_gather_ragged(rows: Tensor) -> List[Tensor]:
    """Every rank's tensor, of the same shape but for its length."""
    lengths = torch.cat(dist.all_gather(torch.tensor([len(rows)]))).tolist()
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    if padded.dtype == torch.int16:  # neither gloo nor NCCL takes int16
        return [t.view(torch.int16)[:n] for t, n in zip(dist.all_gather(padded.view(torch.uint8)), lengths)]
    return [t[:n] for t, n in zip(dist.all_gather(padded), lengths)]
