"""Pre-activation ResNet for 32 x 32 images, the network of PS-KD's and CS-KD's CIFAR-100 experiments."""

from typing import Sequence

from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.registry import MODELS
from torch import nn

__all__ = ['PreActResNet']


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice. As released, the shortcut is of the activated input in every block, through a 1x1 convolution
    where the shape changes. (He et al.'s block adds the input as it came where the shape stays.)"""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), conv3x3(in_channels, channels, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv3x3(channels, channels, 1)
        self.shortcut = make_shortcut(in_channels, channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        activated = self.relu(self.bn1(x))
        out = self.conv1(activated)
        out = self.conv2(self.relu(self.bn2(out)))
        return out + (activated if self.shortcut is None else self.shortcut(activated))


@MODELS.register_module()
class PreActResNet(BaseBackbone):
    """Pre-activation ResNet with a 3x3 stem and no batch norm after the last block, as PS-KD and CS-KD released it.

    After He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016
    https://arxiv.org/abs/1603.05027
    but for the shortcut, which here starts after the first batch norm and ReLU of a block, also where the shape stays.
    With 100 classes, 11,217,444 parameters at depth 18. (The network that PS-KD's tables call PreAct ResNet-101, with
    42,697,380 parameters, is a ResNet-101 with ordinary bottlenecks: MMPretrain's ResNet_CIFAR.)

    Args:
        depth: 18 or 34.
        base_channels: channels of the stem and the first stage.
        out_indices: stages (0 to 3) whose output is returned, ``[B, C, H, W]`` each: the pre-activation sum.
    """

    arch_settings = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        base_channels: int = 64,
        out_indices: Sequence[int] = (3,),
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        if depth not in self.arch_settings:
            raise ValueError(f'depth: must be one of {list(self.arch_settings)}, got {depth}')
        self.out_indices = out_indices
        self.conv1, self.bn1 = conv3x3(in_channels, base_channels, 1), nn.BatchNorm2d(base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.stages = nn.ModuleList()
        channels = base_channels
        for stage, count in enumerate(self.arch_settings[depth]):
            width = base_channels * 2**stage
            layers = []
            for i in range(count):
                layers.append(PreActBlock(channels, width, stride=2 if stage and i == 0 else 1))
                channels = width
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


def conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)


def make_shortcut(in_channels: int, out_channels: int, stride: int):
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
