"""Copies between the host and an accelerator that nobody waits for before they are needed."""

from typing import Optional, Tuple

import torch
from torch import Tensor

__all__ = ['to_device', 'to_host']


def to_host(*tensors: Tensor) -> Tuple[Tuple[Tensor, ...], Optional[torch.cuda.Event]]:
    """Copies tensors of one device to the host, in the background where that is CUDA.

    Returns:
        the copies, and the event after which they are complete; None: they are already.
    """
    if not tensors[0].is_cuda:
        return tuple(tensor.cpu() for tensor in tensors), None
    copies = tuple(_pinned(tensor).copy_(tensor, non_blocking=True) for tensor in tensors)
    event = torch.cuda.Event()
    # The stream of the tensors' own device did the copying. Another device may be the current one.
    event.record(torch.cuda.current_stream(tensors[0].device))
    return copies, event


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, through pinned memory where that is CUDA: a copy of other memory is waited for.

    The tensor may be freed or written to at once. One of a device is moved as ever.
    """
    if device.type == 'cuda' and tensor.device.type == 'cpu' and not tensor.is_pinned():
        tensor = _pinned(tensor).copy_(tensor)  # torch keeps the memory until it was read
    return tensor.to(device, non_blocking=True)


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device='cpu', pin_memory=True)
