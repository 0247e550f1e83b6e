"""The CIFAR networks of the papers' tables that MMPretrain lacks. (Its own ResNet_CIFAR is FRSKD's CIFAR ResNet-18.)

All return a tuple of feature maps ``[B, C, H, W]``, one for each stage in ``out_indices``.
"""

from typing import Sequence

import torch
import torch.nn.functional as F
from mmpretrain.models.backbones import DenseNet, ResNet_CIFAR, ResNeXt
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.registry import MODELS
from torch import Tensor, nn

__all__ = ['DenseNet_CIFAR', 'PyramidNet_CIFAR', 'ResNeXt_CIFAR', 'WideResNet_CIFAR']

INIT = [dict(type='Kaiming', layer=['Conv2d']), dict(type='Constant', val=1, layer=['_BatchNorm'])]


@MODELS.register_module()
class DenseNet_CIFAR(DenseNet):  # noqa: N801, named as MMPretrain names ResNet_CIFAR
    """DenseNet with a stem of one 3x3 convolution; 7,048,548 parameters as ``arch='121'`` with 100 classes.

    Huang et al., "Densely Connected Convolutional Networks", CVPR 2017
    https://arxiv.org/abs/1608.06993

    Args:
        kwargs: of MMPretrain's ``DenseNet``.
    """

    def __init__(self, *, in_channels: int = 3, **kwargs):
        super().__init__(in_channels=in_channels, **kwargs)
        self.stem = nn.Conv2d(in_channels, self.init_channels, 3, padding=1, bias=False)


@MODELS.register_module()
class ResNeXt_CIFAR(ResNet_CIFAR, ResNeXt):  # noqa: N801
    """ResNeXt-29 with three stages; 34,518,948 parameters as 8x64d with 100 classes.

    Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017, section 5.3
    https://arxiv.org/abs/1611.05431

    Args:
        depth: 29.
        groups: cardinality.
        width_per_group: of the 3x3 convolutions in the first stage.
        out_indices: stages (0 to 2) to return.
        kwargs: of MMPretrain's ``ResNet``.
    """

    arch_settings = {29: (ResNeXt.arch_settings[50][0], (3, 3, 3))}  # ResNeXt's own bottleneck, with groups

    def __init__(
        self,
        depth: int = 29,
        groups: int = 8,
        width_per_group: int = 64,
        out_indices: Sequence[int] = (2,),
        **kwargs,
    ):
        options = dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=out_indices)
        super().__init__(depth, groups=groups, width_per_group=width_per_group, **{**options, **kwargs})


@MODELS.register_module()
class WideResNet_CIFAR(BaseBackbone):  # noqa: N801
    """FRSKD's wide residual network; 702,804 parameters as WRN-16-2 with 100 classes.

    Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016
    https://arxiv.org/abs/1605.07146
    As FRSKD trains it: each stage ends in a batch norm, and blocks begin with a ReLU alone. (The released code counts
    703,060: it has one more batch norm, 256 parameters, that it never uses.)

    Args:
        depth: 6 n + 4, with n blocks in each of three stages.
        widen_factor: stages are 16, 32, 64 channels times this wide.
        out_indices: stages (0 to 2) to return.
    """

    def __init__(
        self,
        depth: int = 16,
        widen_factor: int = 2,
        in_channels: int = 3,
        out_indices: Sequence[int] = (2,),
        init_cfg=INIT,
    ):
        super().__init__(init_cfg)
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f'depth: must be 6 n + 4 with n >= 1 blocks in a stage, got {depth}')
        self.out_indices = out_indices
        self.conv1 = _conv(in_channels, 16, 3)
        self.stages = nn.ModuleList()
        channels = 16
        for i, base in enumerate((16, 32, 64)):
            width, blocks = base * widen_factor, []
            for j in range((depth - 4) // 6):
                blocks.append(_WideBlock(channels, width, stride=2 if i and j == 0 else 1))
                channels = width
            self.stages.append(nn.Sequential(*blocks, nn.BatchNorm2d(width)))

    def forward(self, x: Tensor):
        x = self.conv1(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(F.relu(x))
        return tuple(outs)


class _WideBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn = _conv(in_channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.shortcut = None if in_channels == channels else _conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(x)
        out = self.conv2(F.relu(self.bn(self.conv1(activated))))
        # Where shapes agree the released code's shortcut passes by the ReLU.
        return out + (x if self.shortcut is None else self.shortcut(activated))


@MODELS.register_module()
class PyramidNet_CIFAR(BaseBackbone):  # noqa: N801
    """PyramidNet with bottleneck blocks; 26,844,952 parameters at depth 200 and alpha 240 with 100 classes.

    Han et al., "Deep Pyramidal Residual Networks", CVPR 2017
    https://arxiv.org/abs/1610.02915
    ShakeDrop: Yamada et al., "ShakeDrop Regularization for Deep Residual Learning", IEEE Access 2019
    https://arxiv.org/abs/1802.02375

    Args:
        depth: 9 n + 2, with n blocks in each of three stages.
        alpha: channels grow linearly by this many over the blocks, from 16 (times 4 at a block's end).
        shake_drop: probability that ShakeDrop disturbs the last block, growing linearly over the blocks; 0 is none,
            the paper takes 0.5.
        out_indices: stages (0 to 2) to return; the last one after the final batch norm and ReLU.
    """

    def __init__(
        self,
        depth: int = 200,
        alpha: float = 240,
        shake_drop: float = 0.0,
        in_channels: int = 3,
        out_indices: Sequence[int] = (2,),
        init_cfg=INIT,
    ):
        super().__init__(init_cfg)
        if depth < 11 or depth % 9 != 2:
            raise ValueError(f'depth: must be 9 n + 2 with n >= 1 blocks in a stage, got {depth}')
        if not 0 <= shake_drop < 1:
            raise ValueError(f'shake_drop: must lie in [0, 1), got {shake_drop}')
        self.out_indices = out_indices
        self.stem = nn.Sequential(_conv(in_channels, 16, 3), nn.BatchNorm2d(16))
        total = (depth - 2) // 3
        self.stages = nn.ModuleList()
        channels = 16
        for i in range(3):
            blocks = []
            for j in range(total // 3):
                k = i * (total // 3) + j + 1
                planes, stride = round(16 + alpha * k / total), 2 if i and j == 0 else 1
                blocks.append(_PyramidBlock(channels, planes, stride, shake_drop * k / total))
                channels = 4 * planes
            self.stages.append(nn.Sequential(*blocks))
        self.channels = channels
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor):
        x = self.stem(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(F.relu(self.bn(x)) if i == 2 else x)
        return tuple(outs)


class _PyramidBlock(nn.Module):
    """BN - 1x1 - BN - ReLU - 3x3 - BN - ReLU - 1x1 - BN, and a shortcut that is padded with zero channels."""

    def __init__(self, in_channels: int, planes: int, stride: int, drop: float):
        super().__init__()
        self.out_channels, self.stride, self.drop = 4 * planes, stride, drop
        self.layers = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            _conv(in_channels, planes, 1),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            _conv(planes, planes, 3, stride),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            _conv(planes, 4 * planes, 1),
            nn.BatchNorm2d(4 * planes),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        if self.drop:
            out = _ShakeDrop.apply(out, self.drop) if self.training else out * (1 - self.drop)
        if self.stride == 2:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return out + F.pad(x, (0, 0, 0, 0, 0, self.out_channels - x.shape[1]))


class _ShakeDrop(torch.autograd.Function):
    """With probability p scales the branch by a random number per image: U(-1, 1) forwards, another in U(0, 1) back."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.disturbed = torch.rand(()).item() < p
        return x * _per_image(x, -1, 1) if ctx.disturbed else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad * _per_image(grad, 0, 1) if ctx.disturbed else grad), None


def _per_image(x: Tensor, low: float, high: float) -> Tensor:
    return torch.empty(len(x), 1, 1, 1, dtype=x.dtype, device=x.device).uniform_(low, high)


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)
