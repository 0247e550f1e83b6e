"""Random numbers that follow from the training step, and the process or the row of a bank: a resumed run draws what it
would have drawn."""

import torch
from torch import Tensor

__all__ = ['row_uniform', 'step_generator', 'step_seed']

UNIFORMS = 2**16


def step_seed(*numbers: int) -> int:
    """A seed from the step (and, say, the number of the call in it) and this process's rank.

    Example:
        >>> step_seed(3, 0) == step_seed(3, 0), step_seed(3, 0) == step_seed(3, 1), step_seed(3) == step_seed(4)
        (True, False, False)
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    seed = torch.distributed.get_rank() if distributed else 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed


def step_generator(*numbers: int) -> torch.Generator:
    """A generator of its own, on the CPU, seeded by [`step_seed`][]: torch's global state is left as it is.

    Example:
        >>> a, b = (torch.rand(2, generator=step_generator(7)) for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    return torch.Generator().manual_seed(step_seed(*numbers))


def row_uniform(rows: Tensor, step: int) -> Tensor:
    """A number in [0, 1) for each row of a bank: the same in whatever process and batch the row comes.

    Args:
        rows: integers, ``[N]``, on the CPU. Two rows have the same number if they are a multiple of 65,536 apart.

    Example:
        >>> rows = torch.tensor([5, 2, 70000])
        >>> torch.equal(row_uniform(rows, 3).flip(0), row_uniform(rows.flip(0), 3))
        True
    """
    return torch.rand(UNIFORMS, generator=torch.Generator().manual_seed(step), device='cpu')[rows % UNIFORMS]
