"""The feature maps of a classifier's backbone: where they are, found by looking at the network."""

import math
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmpretrain.models.classifiers import ImageClassifier
from torch import Tensor, nn

from selfkd.pyramid import dry_run

__all__ = ['Stage', 'as_map', 'find_stages']

MAX_STAGES = 4  # the released networks have three or four; finer maps cost most and say least of the class


class Stage(NamedTuple):
    """Where a feature map is: in the output of a module of the backbone.

    Attributes:
        module: its name.
        index: which of its outputs, if it has several.
        channels: of the map.
        relu: name of the ReLU that gives the map, if one does.
    """

    module: str
    index: Optional[int]  # type: ignore[assignment]  # a tuple has a method of this name, which nobody calls
    channels: int
    relu: Optional[str]


def find_stages(model: ImageClassifier, names: Optional[Sequence[str]] = None) -> Tuple[List[Stage], int]:
    """Runs a classifier once on a blank image, and looks at what it is made of.

    Its stages are the last feature map of each size among the outputs of the modules that ``backbone.forward`` calls
    itself (not of what is inside these), the coarsest four. A map is ``[B, C, H, W]``, or tokens ``[B, H * W, C]``, or
    such with smaller ones inside, ``[B, H * W, h, w, C]`` (HiViT).
    The model stays as it is: parameters, statistics, modes, torch's random state.

    Args:
        model: with a head; unwrapped.
        names: of modules of the backbone, fine to coarse, to be the stages instead.

    Returns:
        the stages, fine to coarse, and the number of classes C.

    Raises:
        ValueError: names that the backbone lacks, maps of fewer than two sizes, or a network that fails.
    """
    backbone, name = model.backbone, type(model.backbone).__name__
    modules = dict(backbone.named_modules())
    unknown = names if isinstance(names, str) else [n for n in names or () if n not in modules]
    if unknown:
        raise ValueError(
            f'FRSKDImageClassifier: self_teacher.stages must list modules of {name}, of which {unknown!r} is none; '
            'print(model.backbone) shows them'
        )
    size, outputs, relus, num_classes = _watched(model, names)
    found: Dict[Tuple[int, int], Stage] = {}
    for module, output in outputs:
        several = isinstance(output, (tuple, list))
        for index, x in enumerate(output) if several else [(None, output)]:
            feature_map = as_map(x, size)
            if feature_map is None:
                continue
            height, width = feature_map.shape[2:]
            if len(feature_map) > 1 or height * width == 1 or height * size[1] != width * size[0]:
                continue  # maps of parts of an image, pooled, or channels last
            relu = next((relu for relu, y in reversed(relus) if y is x and not several), None)
            found[height, width] = Stage(module, index, feature_map.shape[1], relu)
    stages = [found[size] for size in sorted(found, reverse=True)]
    if len(stages) < 2 or (names and len(stages) != len(names)):
        sizes = ', '.join(f'{height} x {width}' for height, width in found)
        maps = f'feature maps of {"one size only, " * (len(found) == 1)}{sizes},' if found else 'no feature maps'
        raise ValueError(
            f'FRSKDImageClassifier: {name} gives {maps} for an image of {size[0]} x {size[1]}, and the self-teacher is '
            'a pyramid over several sizes: for ViTs and their like use PSKDHook or CSKDHook; in other networks name '
            'modules whose maps differ in size in self_teacher.stages'
        )
    return stages if names else stages[-MAX_STAGES:], num_classes


def _watched(model: ImageClassifier, names: Optional[Sequence[str]]):
    """Image size, outputs of the backbone's modules in order (by name), outputs of its ReLUs (by name), and C."""
    backbone = model.backbone
    channels = next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)
    own = getattr(backbone, 'img_size', None)
    outputs, relus, inside = [], [], []

    def enter(module, args) -> None:
        inside.append(module)

    def leave(module, args, output, name: str) -> None:
        inside.pop()
        if name in names if names else not inside:
            outputs.append((name, output))
        if type(module) is nn.ReLU:
            relus.append((name, output))

    handles = []
    for name, module in backbone.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: leave(m, args, out, name)))
    try:
        for side in [own] if own else [64, 224, 256, 384, 32]:  # small is fast, and too small for some
            size = tuple(side) if isinstance(side, (tuple, list)) else (side, side)
            try:
                with torch.no_grad(), dry_run(model):
                    logits = model.head(model.extract_feat(torch.zeros(1, channels, *size)))
                return size, outputs, relus, logits.shape[-1]
            except Exception as error:
                failed = error
                outputs.clear()
                relus.clear()
                inside.clear()
        raise ValueError(
            f'FRSKDImageClassifier: {type(backbone).__name__} fails on an image of {size}: {failed}'
        ) from failed
    finally:
        for handle in handles:
            handle.remove()


def as_map(x, size: Sequence[int]) -> Optional[Tensor]:
    """A module's output for images of ``size`` as ``[B, C, H, W]``: a map, or tokens of one; None if it is neither."""
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
