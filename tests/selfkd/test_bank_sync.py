"""Banks of several gloo processes become the one a single process would have."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from bank_sync_worker import SETTINGS, plan, predictions, worker

from selfkd.bank import PredictionBank
from selfkd.bank_sync import exchange_rows


@pytest.mark.parametrize('world_size', [2, 4])
def test_every_rank_holds_what_a_single_process_would(world_size, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (world_size, port, str(tmp_path)), nprocs=world_size)
    states = [torch.load(tmp_path / f'{rank}.pth') for rank in range(world_size)]
    for i, settings in enumerate(SETTINGS):
        single = PredictionBank(8, 6, **settings)
        for step in range(3):
            for rank in range(world_size):
                for rows in (rows for s, rows in plan(rank, world_size) if s == step):
                    probs = [predictions(rank, step, position, 6) for position in range(len(rows))]
                    single.write(torch.tensor(rows), torch.stack(probs))
        expected = single.state_dict()
        assert expected['seen'].tolist() == [True] * 6 + [False] * 2
        for state in states:
            for key, value in expected.items():
                torch.testing.assert_close(state[i][key], value, rtol=0, atol=0)


def test_one_process_has_nothing_to_exchange():
    bank = PredictionBank(2, 3)
    bank.write(torch.tensor([1]), torch.tensor([[0.2, 0.5, 0.3]]))
    exchange_rows(bank, torch.tensor([1]), torch.tensor([0]))
    assert bank.seen(torch.tensor([0, 1])).tolist() == [False, True]
    with pytest.raises(ValueError, match='steps: must be one for each of 1 indices, got 2'):
        exchange_rows(bank, torch.tensor([1]), torch.tensor([0, 1]))
