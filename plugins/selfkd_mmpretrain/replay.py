"""A look at what the training pass that is about to begin will compute."""

from typing import Callable

import torch
from torch import Tensor, nn

from selfkd.teacher import as_before, random_states

__all__ = ['rehearse']


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
