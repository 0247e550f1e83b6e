"""FRSKD's self-teacher: a small two-way feature pyramid on a classifier's own feature maps, with its own classifier."""

import functools
from contextlib import contextmanager
from typing import Iterator, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import tracing, wide
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
        counts = [m.num_batches_tracked for m in self.modules() if isinstance(m, _Norm) and m.counted_by_others()]
        if counts:
            torch._foreach_add_(counts, 1)  # type: ignore[arg-type]  # a norm that tracks statistics has a counter
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
    """The self-teacher network of FRSKD for classifiers, a [`BiFPN`][] with a classifier. Used in training only.

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
        """As ``BiFPN.forward``; returns the refined maps and the logits ``[N, C]`` of the coarsest."""
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
        feats = [_relu(feat) for feat in feats]
        laterals = [lateral(feat) for lateral, feat in zip(self.laterals, feats)]
        first_way, second_way = feats, laterals  # L_i and M_i
        if self.first:
            pieces = [lateral.split(c, dim=1) for lateral, c in zip(laterals, self.channels)]
            first_way, second_way = [p[0] for p in pieces], [p[-1] for p in pieces]

        down = self.top_down_weights
        shares = _shares([*down, *(self.bottom_up_weights if self.way_up else [])])
        out, refined = [first_way[last]], [first_way[last]]  # P_i and relu(P_i), the finest first
        for i in range(last - 1, -1, -1):
            coarse = _upsampled_conv(self.from_coarser[i], refined[0], first_way[i].shape[2:])
            out.insert(0, self.top_down[i](_weighted_sum(shares[i], first_way[i], coarse)))
            refined.insert(0, F.relu(out[0]))
        if not self.way_up:
            return out if preact else refined

        out, activated = out[:1], refined[:1]  # O_i and relu(O_i)
        for i in range(1, last + 1):
            fine = self.from_finer[i - 1](_pool(activated[-1], feats[i].shape[2:]))
            maps = (second_way[i], fine) if i == last else (second_way[i], refined[i], fine)
            out.append(self.bottom_up[i - 1](_weighted_sum(shares[len(down) + i - 1], *maps)))
            activated.append(F.relu(out[-1]))
        return out if preact else activated


class _Norm(nn.BatchNorm2d):
    """A batch norm whose batches the pyramid counts, those of all its norms at once."""

    def counted_by_others(self) -> bool:
        return self.training and self.track_running_stats and self.momentum is not None and not tracing()

    def forward(self, x: Tensor) -> Tensor:
        if not self.counted_by_others():
            return super().forward(x)
        self._check_input_dim(x)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, True, self.momentum, self.eps)


def _pointwise(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def _conv1x1(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(_pointwise(in_channels, out_channels), _Norm(out_channels), nn.ReLU(inplace=True))


def _separable3x3(channels: int, depth: int) -> nn.Sequential:
    layers = []
    for _ in range(depth):
        layers += [
            Depthwise3x3(channels),
            _pointwise(channels, channels),
            _Norm(channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers[:-1])


def _shares(weights: Sequence[Tensor]) -> Tuple[Tensor, ...]:
    """The weights of each sum, 2 or 3, as shares of their total: of all sums at once."""
    none = weights[0].new_zeros(1)
    rows = torch.cat([part for w in weights for part in (w, none)[: 4 - len(w)]]).view(-1, 3)
    rows = F.relu(rows)
    return tuple((rows / (rows.sum(1, keepdim=True) + 1e-6)).unbind())


def _weighted_sum(weights: Tensor, *maps: Tensor) -> Tensor:
    """sum_k w_k maps_k; a last map that is smaller than the first is upsampled (nearest)."""
    if maps[-1].shape != maps[0].shape:
        maps = (*maps[:-1], F.interpolate(maps[-1], maps[0].shape[2:], mode='nearest'))
    if not tracing():
        return _WeightedSum.apply(weights, *maps)
    return functools.reduce(torch.add, (w * m for w, m in zip(weights, maps)))


class _WeightedSum(torch.autograd.Function):
    """In one pass over each map, and one for each gradient."""

    @staticmethod
    def forward(ctx, weights, *maps):
        ctx.save_for_backward(weights, *maps)
        weights = weights.to(maps[0].dtype)
        total = maps[0] * weights[0]
        for w, m in zip(weights[1:], maps[1:]):
            total.addcmul_(m, w)
        return total

    @staticmethod
    def backward(ctx, grad):
        weights, *maps = ctx.saved_tensors
        of_weights = [_dot(grad, m) for m in maps]
        of_weights += of_weights[-1:] * (len(weights) - len(maps))  # of a share of nothing, which has no weight
        return (torch.stack(of_weights), *(grad * w for w, _ in zip(weights, maps)))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    plain = x.dtype == y.dtype == torch.float32 and x.is_contiguous() and y.is_contiguous()
    if plain and x.numel() < 2**31:  # torch's limit
        return torch.dot(x.view(-1), y.view(-1))
    return (x * y).sum(dtype=wide(x.dtype))


def _relu(maps: Tensor) -> Tensor:
    """Of maps that a ReLU made: they themselves, a copy less."""
    made_by = None if tracing() else type(maps.grad_fn).__name__
    return maps if made_by == 'ReluBackward0' else F.relu(maps)


def _upsampled_conv(conv: nn.Sequential, x: Tensor, size: Sequence[int]) -> Tensor:
    """What ``conv`` gives on x upsampled (nearest) to ``size``, but perhaps on fewer pixels: upsample the result."""
    copies = size[0] * size[1] // (x.shape[2] * x.shape[3])
    even = size[0] % x.shape[2] == 0 and size[1] % x.shape[3] == 0
    norm = conv[1]
    pixels = len(x) * x.shape[2] * x.shape[3]
    if even and (not norm.training or copies == 1):
        return conv(x)
    plain = isinstance(norm, _Norm) and norm.running_var is not None and norm.momentum is not None
    if not even or not plain or pixels == 1 or tracing():
        # Pixels repeated unequally change the statistics; a SyncBatchNorm counts other ranks' pixels as well.
        return conv(F.interpolate(x, size, mode='nearest'))
    # A 1x1 convolution and a batch norm commute with repeating every pixel equally often, except that the running
    # variance is the unbiased one: n / (n - 1) of the pixels after repetition, not before.
    repeated = copies * pixels
    ratio = (repeated / (repeated - 1)) / (pixels / (pixels - 1))
    norm.running_var.data.div_(ratio)  # .data: autograd takes a change of what the norm does not use for one
    out = conv(x)
    norm.running_var.data.mul_(ratio)
    return out


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
