"""The feature maps of a network, found by looking at it."""

import math
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor, nn

__all__ = ['Place', 'as_map', 'last_of_each_size', 'outputs_of']


class Place(NamedTuple):
    """Where a feature map is: in the output of a module.

    Attributes:
        module: its name.
        index: which of its outputs, if it has several.
        output: what it gave there.
    """

    module: str
    index: Optional[int]  # type: ignore[assignment]  # a tuple has a method of this name, which nobody calls
    output: Tensor


@contextmanager
def outputs_of(network: nn.Module, names: Optional[Sequence[str]] = None) -> Iterator[List[Tuple[str, Any]]]:
    """A list that gets what the modules give that ``network.forward`` calls itself, and not what is inside these, by
    name and in order; or what those of the names give."""
    outputs: List[Tuple[str, Any]] = []
    inside: List[nn.Module] = []

    def enter(module, args) -> None:
        inside.append(module)

    def leave(module, args, output, name: str) -> None:
        inside.pop()
        if names or not inside:
            outputs.append((name, output))

    handles = []
    for name, module in network.named_modules():
        if name and (not names or name in names):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: leave(m, args, out, name)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def last_of_each_size(outputs: Sequence[Tuple[str, Any]], size: Sequence[int]) -> Dict[Tuple[int, int], Place]:
    """By height and width, the last map among [`outputs_of`][] for one image of ``size``."""
    found: Dict[Tuple[int, int], Place] = {}
    for module, output in outputs:
        several = isinstance(output, (tuple, list))
        for index, x in enumerate(output) if several else [(None, output)]:
            feature_map = as_map(x, size)
            if feature_map is None:
                continue
            height, width = feature_map.shape[2:]
            if len(feature_map) > 1 or height * width == 1 or height * size[1] != width * size[0]:
                continue  # maps of parts of an image, pooled, or channels last
            found[height, width] = Place(module, index, x)
    return found


def as_map(x: Any, size: Sequence[int]) -> Optional[Tensor]:
    """A module's output for images of ``size`` as ``[B, C, H, W]``: a map, or tokens of one; None if it is neither.

    Tokens are ``[B, H * W, C]``, or such with smaller maps inside, ``[B, H * W, h, w, C]`` (HiViT).
    """
    if not isinstance(x, Tensor) or x.dim() not in (3, 4, 5):
        return None
    if x.dim() == 4:
        return x
    for halvings in range(1, 7):
        height, width = (math.ceil(s / 2**halvings) for s in size)
        if height * width == x.shape[1]:
            if x.dim() == 5:
                return x.unflatten(1, (height, width)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
            return x.transpose(1, 2).unflatten(2, (height, width))
    return None
