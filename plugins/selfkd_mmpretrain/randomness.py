"""Random states of an earlier moment: what is run in them draws the numbers that were drawn then."""

import random
from contextlib import contextmanager
from typing import Callable, Iterator, Tuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ['as_before', 'random_states', 'rehearse']


def random_states(device: torch.device) -> Tuple:
    """The present ones, of Python, NumPy, torch on the CPU, and torch on the device."""
    of_device = torch.cuda.get_rng_state(device) if device.type == 'cuda' else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), of_device


@contextmanager
def as_before(states: Tuple, device: torch.device) -> Iterator[None]:
    """Runs its body in ``random_states`` of before; afterwards they are what they were."""
    present = random_states(device)
    _set(states, device)
    try:
        yield
    finally:
        _set(present, device)


@torch.no_grad()
def rehearse(function: Callable, model: nn.Module, inputs: Tensor):
    """``function(model, inputs)`` as it will be in the training pass that is about to begin: with the same noise.

    It leaves no trace: random states and buffers are what they were.

    Args:
        function: of the model.
        model: in training mode.
        inputs: preprocessed, ``[B, ...]``.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with as_before(random_states(inputs.device), inputs.device):
        try:
            return function(model, inputs.clone())  # some models write into them
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
            torch.clear_autocast_cache()  # it holds weights that were cast without gradient


def _set(states: Tuple, device: torch.device) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3], device)
