"""Banks of several gloo processes become the one a single process would have."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from bank_sync_worker import plan, predictions, worker

from selfkd.bank import PredictionBank


@pytest.mark.parametrize('settings', [{}, {'dtype': torch.float16}, {'top_k': 2}])
def test_every_rank_holds_what_a_single_process_would(settings, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (port, settings, str(tmp_path)), nprocs=3)
    single = PredictionBank(8, 6, **settings)
    for step in range(3):
        for rank in range(3):
            for rows in (rows for s, rows in plan(rank) if s == step):
                single.write(torch.tensor(rows), torch.stack([predictions(rank, step, i, 6) for i in range(len(rows))]))
    for rank in range(3):
        state = torch.load(tmp_path / f'{rank}.pth')
        for key, value in single.state_dict().items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(state[key], value, rtol=0, atol=0)
    assert single.state_dict()['seen'].tolist() == [True] * 6 + [False] * 2
