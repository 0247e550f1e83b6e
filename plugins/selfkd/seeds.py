"""Random numbers that follow from the training step and the process: a resumed run draws what it would have drawn."""

import torch

__all__ = ['step_generator', 'step_seed']


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
    """A generator of its own, on the CPU, seeded by :func:`step_seed`: torch's global state is left as it is.

    Example:
        >>> a, b = (torch.rand(2, generator=step_generator(7)) for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    return torch.Generator().manual_seed(step_seed(*numbers))
