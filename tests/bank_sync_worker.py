"""What each process of test_bank_sync.py runs; importable by the processes it spawns."""

import torch
import torch.distributed as dist

from selfkd import bank_sync
from selfkd.bank import PredictionBank


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


SETTINGS = ({}, {'dtype': torch.float16}, {'top_k': 2})


def worker(rank, world_size, port, folder):
    bank_sync.CHUNK = 2  # so that rows take several rounds
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=world_size)
    banks = [PredictionBank(8, 6, **settings) for settings in SETTINGS]
    for bank in banks:
        nothing = torch.zeros(0, dtype=torch.long)
        bank_sync.exchange_rows(bank, nothing, nothing)  # a first exchange in which nobody has anything
        indices, steps = [torch.tensor([7])], [0]  # said to be written, but its row was not finite, so that it was not
        for step, rows in plan(rank, world_size):
            bank.write(torch.tensor(rows), torch.stack([predictions(rank, step, i, 6) for i in range(len(rows))]))
            indices.append(torch.tensor(rows))
            steps += [step] * len(rows)
        bank_sync.exchange_rows(bank, torch.cat(indices), torch.tensor(steps))
    torch.save([bank.state_dict() for bank in banks], f'{folder}/{rank}.pth')
    dist.destroy_process_group()
