"""FRSKD's self-teacher: a small two-way feature pyramid on a classifier's own feature maps, with its own classifier."""

from contextlib import contextmanager
from typing import Iterator, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import tracing
from .depthwise import Depthwise3x3

__all__ = ['BiFPN', 'SelfTeacherPyramid', 'dry_run']


class BiFPN(nn.Module):
    """FRSKD's two-way feature pyramid ("BiFPNc"): each pass fuses the levels top-down, then bottom-up.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021,
    section 3.1
    https://arxiv.org/abs/2103.08273

    It computes what the straightforward arrangement of its layers computes (tests/helpers/plain_pyramid.py has one to
    compare with), with less work: convolutions and batch norms run before nearest upsampling, not after it, and the
    two lateral convolutions of a level are one.

    Args:
        in_channels: channels of the feature maps, fine to coarse; two levels or more.
        channels: channels of the refined maps, as many.
        depth: separable 3x3 convolutions per fusion.
        repeats: passes top-down and bottom-up.
        last_top_down: the last pass has no way up, its refined maps are its top-down maps: for a pyramid whose loss
            reads the finest map alone, as FRSKD's for segmentation. A way up would get no gradient, and its maps, which
            teach, would stay noise.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: Sequence[int],
        *,
        depth: int = 2,
        repeats: int = 1,
        last_top_down: bool = False,
    ):
        super().__init__()
        if len(in_channels) < 2 or min(in_channels) < 1:
            raise ValueError(f'in_channels: must name the channels of at least 2 levels, got {list(in_channels)}')
        if len(channels) != len(in_channels) or min(channels) < 1:
            raise ValueError(f'channels: must name one width for each of {list(in_channels)}, got {list(channels)}')
        for name, value in (('depth', depth), ('repeats', repeats)):
            if value < 1:
                raise ValueError(f'{name}: must be at least 1, got {value}')
        self.in_channels, self.channels = list(in_channels), list(channels)
        self.layers = nn.ModuleList(
            _Pass(
                self.in_channels if i == 0 else self.channels,
                self.channels,
                depth,
                first=i == 0,
                way_up=not (last_top_down and i == repeats - 1),
            )
            for i in range(repeats)
        )

    def forward(self, feats: Sequence[Tensor], *, preact: bool = False) -> List[Tensor]:
        """Refines the feature maps.

        Args:
            feats: F_i, ``[N, in_channels[i], H_i, W_i]``, fine to coarse, before or after their ReLU. Sizes usually
                halve from level to level; any sizes that do not grow work.
            preact: return the refined maps before their last ReLU (the overhaul loss wants them).

        Returns:
            refined maps T_i, ``[N, channels[i], H_i, W_i]``.

        Raises:
            ValueError: another number of maps or channels than promised, or maps that are not fine to coarse.
        """
        self._check(feats)
        maps = list(feats)
        for i, layer in enumerate(self.layers):
            maps = layer(maps, preact and i + 1 == len(self.layers))
        return maps

    def _check(self, feats: Sequence[Tensor]) -> None:
        channels = [f.shape[1] for f in feats]
        if channels != self.in_channels:
            raise ValueError(f'feats: channels must be in_channels={self.in_channels}, fine to coarse, got {channels}')
        sizes = [tuple(f.shape[2:]) for f in feats]
        if any(len(s) != 2 for s in sizes) or any(a < b for s, t in zip(sizes, sizes[1:]) for a, b in zip(s, t)):
            raise ValueError(f'feats: must be maps [N, C, H, W], fine to coarse, got sizes {sizes}')


class SelfTeacherPyramid(BiFPN):
    """The self-teacher network of FRSKD for classifiers, a :class:`BiFPN` with a classifier. Used in training only.

    Args:
        in_channels: channels c_i of the feature maps, fine to coarse; two levels or more.
        num_classes: C.
        width: level i is ``width * c_i`` channels wide in the pyramid.
        depth: separable 3x3 convolutions per fusion.
        repeats: passes top-down and bottom-up.

    Example:
        >>> pyramid = SelfTeacherPyramid([8, 16], num_classes=10)
        >>> maps, logits = pyramid([torch.rand(2, 8, 8, 8), torch.rand(2, 16, 4, 4)])
        >>> [tuple(m.shape) for m in maps], tuple(logits.shape)
        ([(2, 16, 8, 8), (2, 32, 4, 4)], (2, 10))
    """

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, *, width: int = 2, depth: int = 2, repeats: int = 1
    ):
        for name, value in (('num_classes', num_classes), ('width', width)):
            if value < 1:
                raise ValueError(f'{name}: must be at least 1, got {value}')
        super().__init__(in_channels, [width * c for c in in_channels], depth=depth, repeats=repeats)
        self.fc = nn.Linear(self.channels[-1], num_classes)

    def forward(  # type: ignore[override]
        self, feats: Sequence[Tensor], *, preact: bool = False
    ) -> Tuple[List[Tensor], Tensor]:
        """As :meth:`BiFPN.forward`; returns the refined maps and the logits ``[N, C]`` of the coarsest."""
        maps = super().forward(feats, preact=preact)
        coarsest = F.relu(maps[-1]) if preact else maps[-1]
        return maps, self.fc(coarsest.mean((2, 3)))


class _Pass(nn.Module):
    """One way top-down, and one bottom-up unless told otherwise."""

    def __init__(self, in_channels: Sequence[int], channels: Sequence[int], depth: int, first: bool, way_up: bool):
        super().__init__()
        coarser = range(1, len(channels))
        self.channels, self.first, self.way_up = list(channels), first, way_up
        # The inputs of the two ways at a level, L_i and M_i, read the same map: one convolution makes both. A
        # later pass takes its L_i as it comes.
        ways = [first + (way_up and i > 0) for i in range(len(channels))]
        self.laterals = nn.ModuleList(
            _conv1x1(c_in, c * n) if n else nn.Identity() for c_in, c, n in zip(in_channels, channels, ways)
        )
        self.from_coarser = nn.ModuleList(_conv1x1(channels[i], channels[i - 1]) for i in coarser)
        self.top_down = nn.ModuleList(_separable3x3(channels[i - 1], depth) for i in coarser)
        self.top_down_weights = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in coarser)
        if way_up:
            self.from_finer = nn.ModuleList(_conv1x1(channels[i - 1], channels[i]) for i in coarser)
            self.bottom_up = nn.ModuleList(_separable3x3(channels[i], depth) for i in coarser)
            self.bottom_up_weights = nn.ParameterList(
                nn.Parameter(torch.ones(3 if i + 1 < len(channels) else 2)) for i in coarser
            )

    def forward(self, feats: Sequence[Tensor], preact: bool) -> List[Tensor]:
        last = len(feats) - 1
        feats = [F.relu(feat) for feat in feats]
        laterals = [lateral(feat) for lateral, feat in zip(self.laterals, feats)]
        first_way, second_way = feats, laterals  # L_i and M_i
        if self.first:
            pieces = [lateral.split(c, dim=1) for lateral, c in zip(laterals, self.channels)]
            first_way, second_way = [p[0] for p in pieces], [p[-1] for p in pieces]

        out, refined = [first_way[last]], [first_way[last]]  # P_i and relu(P_i), the finest first
        for i in range(last - 1, -1, -1):
            coarse = _upsampled_conv(self.from_coarser[i], refined[0], first_way[i].shape[2:])
            out.insert(0, self.top_down[i](_weighted_sum(self.top_down_weights[i], first_way[i], coarse)))
            refined.insert(0, F.relu(out[0]))
        if not self.way_up:
            return out if preact else refined

        out, activated = out[:1], refined[:1]  # O_i and relu(O_i)
        for i in range(1, last + 1):
            fine = self.from_finer[i - 1](_pool(activated[-1], feats[i].shape[2:]))
            maps = (second_way[i], fine) if i == last else (second_way[i], refined[i], fine)
            out.append(self.bottom_up[i - 1](_weighted_sum(self.bottom_up_weights[i - 1], *maps)))
            activated.append(F.relu(out[-1]))
        return out if preact else activated


def _pointwise(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def _conv1x1(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(_pointwise(in_channels, out_channels), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _separable3x3(channels: int, depth: int) -> nn.Sequential:
    layers = []
    for _ in range(depth):
        layers += [
            Depthwise3x3(channels),
            _pointwise(channels, channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers[:-1])


def _weighted_sum(weights: Tensor, *maps: Tensor) -> Tensor:
    """sum_k w_k maps_k with normalised weights; a last map that is smaller than the first is upsampled (nearest)."""
    weights = F.relu(weights)
    terms = [w * m for w, m in zip(weights / (weights.sum() + 1e-6), maps)]
    if terms[-1].shape != terms[0].shape:
        terms[-1] = F.interpolate(terms[-1], terms[0].shape[2:], mode='nearest')
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _upsampled_conv(conv: nn.Sequential, x: Tensor, size: Sequence[int]) -> Tensor:
    """What ``conv`` gives on x upsampled (nearest) to ``size``, but perhaps on fewer pixels: upsample the result."""
    copies = size[0] * size[1] // (x.shape[2] * x.shape[3])
    even = size[0] % x.shape[2] == 0 and size[1] % x.shape[3] == 0
    convolution, norm, relu = conv[0], conv[1], conv[2]
    pixels = len(x) * x.shape[2] * x.shape[3]
    if even and (not norm.training or copies == 1):
        return conv(x)
    plain = type(norm) is nn.BatchNorm2d and norm.running_var is not None and norm.momentum is not None
    if not even or not plain or pixels == 1 or tracing():
        # Pixels repeated unequally change the statistics; a SyncBatchNorm counts other ranks' pixels as well.
        return conv(F.interpolate(x, size, mode='nearest'))
    # A 1x1 convolution and a batch norm commute with repeating every pixel equally often, except that the running
    # variance is the unbiased one: n / (n - 1) of the pixels after repetition, not before.
    variance = torch.zeros_like(norm.running_var)
    out = F.batch_norm(
        convolution(x), norm.running_mean, variance, norm.weight, norm.bias, True, norm.momentum, norm.eps
    )
    repeated = copies * pixels
    with torch.no_grad():
        ratio = (repeated / (repeated - 1)) / (pixels / (pixels - 1))
        norm.running_var.mul_(1 - norm.momentum).add_(variance, alpha=ratio)
        norm.num_batches_tracked.add_(1)
    return relu(out)


def _pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """Max-pooling 3x3 with stride 2 and "same" padding, or to ``size`` where that does not give it.

    For maps after ReLU: "same" padding is with zeros, which then never win.
    """
    height, width = x.shape[2:]
    if (height, width) == tuple(size):
        return x
    if ((height + 1) // 2, (width + 1) // 2) == tuple(size):
        return F.max_pool2d(x, 3, 2, padding=(height % 2, width % 2), ceil_mode=True)
    return _adaptive_max(_adaptive_max(x, 2, size[0]), 3, size[1])


def _adaptive_max(x: Tensor, dim: int, size: int) -> Tensor:
    """``F.adaptive_max_pool2d`` along one dimension: torch's has no deterministic gradient on CUDA."""
    length, numbers = x.shape[dim], torch.arange(size, device=x.device)
    start, end = numbers * length // size, ((numbers + 1) * length + size - 1) // size
    places = start[:, None] + torch.arange(length // size + 2, device=x.device)
    windows = x.index_select(dim, torch.minimum(places, end[:, None] - 1).flatten())
    return windows.unflatten(dim, places.shape).max(dim + 1).values


@contextmanager
def dry_run(model: nn.Module) -> Iterator[None]:
    """For a look at the feature maps of a model, which stays as it is: it is in evaluation mode in here, and afterwards
    its modules' modes and torch's random state are what they were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        model.train()  # some keep in evaluation what they must not in training
        for module, training in modes.items():
            module.training = training
