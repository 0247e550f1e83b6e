"""FRSKD's segmentation model as its authors released it: the neck, and the self-teacher made of the same layers.

Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
https://arxiv.org/abs/2103.08273
"""

from typing import List, Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from .frskd import SelfTeacher

__all__ = ['BiFPNLayer', 'EfficientDetNeck', 'EfficientDetSelfTeacher']


class BiFPNLayer(nn.Module):
    """Sums of maps of one width, top-down and then bottom-up, each followed by a weight per channel, BN and ReLU.

    Args:
        width: channels of every map.
        levels: maps.
        bottom_up: without it, the top-down maps are the result.
    """

    def __init__(self, width: int, levels: int = 6, *, bottom_up: bool = True):
        super().__init__()
        self.top_down = nn.ModuleList(_scale(width) for _ in range(levels))
        self.bottom_up = nn.ModuleList(_scale(width) for _ in range(levels - 1 if bottom_up else 0))

    def forward(self, feats: Sequence[Tensor]) -> List[Tensor]:
        """Maps ``[B, width, H_i, W_i]``, fine to coarse; returns as many of the same shapes."""
        down = [self.top_down[-1](feats[-1])]
        for scale, feat in zip(self.top_down[-2::-1], feats[-2::-1]):
            down.insert(0, scale(feat + _bilinear(down[0], feat)))
        if not self.bottom_up:
            return down
        up = down[:1]
        for scale, feat, refined in zip(self.bottom_up, feats[1:], down[1:]):
            up.append(scale(feat + refined + F.interpolate(up[-1], feat.shape[2:], mode='nearest')))
        return up


@MODELS.register_module()
class EfficientDetNeck(BaseModule):
    """Six maps P2 to P7 of one width: P6 and P7 by convolutions of stride 2, an FPN, and layers of two-way fusion.

    The two 3x3 convolutions ``smooth`` are never called: the released model has them, and they are in its count of
    parameters.

    Args:
        in_channels: of P2 to P5.
        width: 64, 88 and 112 for EfficientNet-b0, -b1 and -b2.
        layers: of ``BiFPNLayer``.
    """

    def __init__(self, in_channels: Sequence[int], width: int, layers: int = 3):
        super().__init__()
        self.laterals = nn.ModuleList(_conv(channels, width, 1) for channels in in_channels)
        self.coarser = nn.ModuleList([_conv(in_channels[-1], width, 3, 2), _conv(width, width, 3, 2)])
        self.smooth = nn.ModuleList(_conv(width, width, 3) for _ in range(2))
        self.layers = nn.ModuleList(BiFPNLayer(width, len(in_channels) + 2) for _ in range(layers))

    def forward(self, feats: Sequence[Tensor]) -> List[Tensor]:
        """P2 to P5 of the backbone; returns six maps, fine to coarse."""
        maps = [lateral(feat) for lateral, feat in zip(self.laterals, feats)]
        for i in range(len(maps) - 2, -1, -1):
            maps[i] = maps[i] + _bilinear(maps[i + 1], maps[i])
        maps.append(self.coarser[0](feats[-1]))
        maps.append(self.coarser[1](maps[-1]))
        for layer in self.layers:
            maps = layer(maps)
        return maps


@MODELS.register_module()
class EfficientDetSelfTeacher(SelfTeacher):
    """The self-teacher of FRSKD's segmentation model: two more layers on the neck's maps, the last one top-down only.

    As [`SelfTeacher`][], but that the KL is over all pixels, ignored ones too.

    Args:
        in_channels: of the neck's maps, all of one width.
        kwargs: of [`SelfTeacher`][] but for ``width``, ``depth`` and ``repeats``.
    """

    def __init__(self, in_channels: Sequence[int], **kwargs):
        unknown = sorted({'width', 'depth', 'repeats'} & set(kwargs))
        if unknown or len(set(in_channels)) != 1:
            raise ValueError(
                'EfficientDetSelfTeacher: it has two layers as wide as the maps, which must be of one width, '
                f'got maps of {list(in_channels)} channels and the options {unknown}: use SelfTeacher for others'
            )
        super().__init__(in_channels, width=in_channels[0], **kwargs)

    def make_pyramid(self, width: int, depth: int, repeats: int) -> nn.Module:
        levels = len(self.in_channels)
        return nn.Sequential(BiFPNLayer(width, levels), BiFPNLayer(width, levels, bottom_up=False))

    def average(self, kl: Tensor, label: Tensor, avg_non_ignore: bool) -> Tensor:
        return kl.sum() / kl.numel()


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, size // 2),
        nn.BatchNorm2d(out_channels, eps=1e-4, momentum=0.997),
        nn.ReLU(inplace=True),
    )


def _scale(width: int) -> nn.Sequential:
    return nn.Sequential(_ChannelScale(width, width, 1, groups=width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class _ChannelScale(nn.Conv2d):
    """A depthwise 1x1 convolution as what it is, a weight and a bias a channel: on a CPU in half of the time."""

    bias: Tensor  # there is one

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.view(-1, 1, 1), self.bias.view(-1, 1, 1)
        return x * weight.to(x.dtype) + bias.to(x.dtype)


def _bilinear(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode='bilinear', align_corners=False)
