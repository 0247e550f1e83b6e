"""What each process of test_bank_sync.py runs; importable by the processes it spawns."""

import torch
import torch.distributed as dist

from selfkd.bank import PredictionBank


def plan(rank):
    """What each rank writes: (step, indices). Samples 1 and 5 are written by several ranks, 1 twice in one step."""
    return {
        0: [(0, [0, 1]), (1, [2, 5])],
        1: [(0, [1, 3]), (1, [4, 4]), (2, [5])],
        2: [],
    }[rank]


def predictions(rank, step, position, classes):
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + position)
    return torch.randn(classes, generator=generator).softmax(0)


def worker(rank, port, settings, folder):
    from selfkd_mmengine import bank_sync

    bank_sync.CHUNK = 2  # so that rows take several rounds
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=3)
    bank = PredictionBank(8, 6, **settings)
    indices, steps = [torch.zeros(0, dtype=torch.long)], []
    for step, rows in plan(rank):
        bank.write(torch.tensor(rows), torch.stack([predictions(rank, step, i, 6) for i in range(len(rows))]))
        indices.append(torch.tensor(rows))
        steps += [step] * len(rows)
    bank_sync.exchange_rows(bank, torch.cat(indices), torch.tensor(steps, dtype=torch.long))
    torch.save(bank.state_dict(), f'{folder}/{rank}.pth')
