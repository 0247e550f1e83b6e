"""A forward pass that can be run again as it was: what a classifier predicts, beside what its loss has seen."""

import random
from typing import Callable, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ['Replay']


class Replay:
    """The start of a model's training pass: its inputs and the random states.

    Args:
        model: the model that is about to run.
        inputs: preprocessed, ``[B, ...]``.
    """

    def __init__(self, model: nn.Module, inputs: Tensor):
        self.model, self.inputs = model, inputs.clone()  # some models write into them
        self.device = inputs.device if inputs.is_cuda else None
        self._states = _random_states(self.device)

    @torch.no_grad()
    def __call__(self, function: Callable):
        """``function(model, inputs)`` with the same noise; random states and buffers are afterwards what they were."""
        states, buffers = _random_states(self.device), [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        _set_random_states(self._states, self.device)
        try:
            return function(self.model, self.inputs)
        finally:
            _set_random_states(states, self.device)
            for buffer, value in buffers:
                buffer.data.copy_(value)  # .data: autograd has kept it for the backward pass, with this value


def _random_states(device: Optional[torch.device]) -> Tuple:
    of_device = None if device is None else torch.cuda.get_rng_state(device)
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), of_device


def _set_random_states(states: Tuple, device: Optional[torch.device]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if device is not None:
        torch.cuda.set_rng_state(states[3], device)
