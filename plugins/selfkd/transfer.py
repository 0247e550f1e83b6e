"""Copies from an accelerator to the host that nobody waits for before they are needed."""

from typing import Optional, Tuple

import torch
from torch import Tensor

__all__ = ['to_host']


def to_host(*tensors: Tensor) -> Tuple[Tuple[Tensor, ...], Optional[torch.cuda.Event]]:
    """Copies tensors of one device to the host, in the background where that is CUDA.

    Returns:
        the copies, and the event after which they are complete; None: they are already.
    """
    if not tensors[0].is_cuda:
        return tuple(tensor.cpu() for tensor in tensors), None
    copies = tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in tensors
    )
    event = torch.cuda.Event()
    # The stream of the tensors' own device did the copying. Another device may be the current one.
    event.record(torch.cuda.current_stream(tensors[0].device))
    return copies, event
