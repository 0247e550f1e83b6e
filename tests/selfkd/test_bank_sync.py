"""Banks of several gloo processes become the one a single process would have."""

import functools

import pytest
import torch
import torch.distributed as dist
from helpers.processes import in_processes

from selfkd import bank_sync
from selfkd.bank import PredictionBank
from selfkd.bank_sync import exchange_rows
from selfkd.storage import KINDS

SETTINGS = [dict(dtype=dtype, top_k=top_k) for dtype in KINDS for top_k in (None, 2)]


def plan(rank, world_size):
    """What a rank writes: (step, indices). Samples 1 and 5 are written by several ranks, 4 twice in one step."""
    plans = {
        2: [[(0, [0, 1]), (1, [2, 5])], [(0, [1, 3]), (1, [4, 4]), (2, [5])]],
        4: [[(0, [0, 1]), (2, [5])], [(0, [1]), (1, [4, 4]), (2, [5])], [], [(0, [3]), (1, [2, 1, 5])]],
    }
    return plans[world_size][rank]


def predictions(rank, step, position, classes):
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + position)
    return torch.randn(classes, generator=generator).softmax(0)


def not_finite(bank, rows):
    values = torch.full((len(rows), 6), torch.nan)
    return torch.tensor(rows), bank.storage.encode(values, torch.tensor(rows)), values.isfinite().all(1)


def exchanged(world_size, rank):
    bank_sync.SLICE, bank_sync.BYTES = 5, 1  # so that there are several slices, and rows take several rounds
    dist.init_process_group('gloo')
    banks = [PredictionBank(8, 6, **settings) for settings in SETTINGS]
    for bank in banks:
        exchange_rows(bank)  # a first exchange in which nobody has anything
        for step, rows in plan(rank, world_size):
            probs = torch.stack([predictions(rank, step, i, 6) for i in range(len(rows))])
            bank.write(torch.tensor(rows), probs, step=step)
        bank._write_later(*not_finite(bank, [7]), step=9)  # as an accelerator's: never written
        if rank == 0:  # was written before by another rank, and stays that one's
            bank._write_later(*not_finite(bank, [3]), step=9)
        exchange_rows(bank)
    states = [bank.state_dict() for bank in banks]
    if rank == 0:  # this rank alone saw samples; all know their labels afterwards
        banks[0].check_labels(torch.tensor([6, 7]), torch.tensor([3, 4]))
        banks[0].write(torch.tensor([6, 7]), torch.full((2, 6), 1 / 6))
    exchange_rows(banks[0])
    with pytest.raises(ValueError, match='row 7 had the label 4 before, and has the label 3 now'):
        banks[0].check_labels(torch.tensor([7]), torch.tensor([3]))
    return states


@pytest.mark.parametrize('world_size', [2, 4])
def test_every_rank_holds_what_a_single_process_would(world_size, tmp_path):
    states = in_processes(tmp_path, functools.partial(exchanged, world_size), world_size)
    for i, settings in enumerate(SETTINGS):
        single = PredictionBank(8, 6, **settings)
        for step in range(3):
            for rank in range(world_size):
                for rows in (rows for s, rows in plan(rank, world_size) if s == step):
                    probs = [predictions(rank, step, position, 6) for position in range(len(rows))]
                    single.write(torch.tensor(rows), torch.stack(probs), step=step)
        expected = {key: value for key, value in single.state_dict().items() if isinstance(value, torch.Tensor)}
        assert expected['seen'].tolist() == [True] * 6 + [False] * 2
        for state in states:
            for key, value in expected.items():
                torch.testing.assert_close(state[i][key], value, rtol=0, atol=0)


def test_one_process_has_nothing_to_exchange():
    bank = PredictionBank(2, 3)
    bank.write(torch.tensor([1]), torch.tensor([[0.2, 0.5, 0.3]]))
    exchange_rows(bank)
    assert bank.seen(torch.tensor([0, 1])).tolist() == [False, True]
    assert bank.nbytes == 2 * (3 * 4 + 1)  # who wrote a row when is not kept
