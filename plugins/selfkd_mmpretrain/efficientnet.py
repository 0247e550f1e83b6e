"""The backbone of FRSKD's segmentation model: MMPretrain's EfficientNet, read and padded as the released code does.

For a config of MMSegmentation, which names the class by its whole path.
"""

import math
from functools import partial
from typing import Optional, Tuple

import torch.nn.functional as F
from mmpretrain.models import EfficientNet
from mmpretrain.registry import MODELS
from torch import Tensor, nn

__all__ = ['EfficientNetLevels']


@MODELS.register_module()
class EfficientNetLevels(EfficientNet):
    """Levels P2 to P5 of an EfficientNet, at strides of 4, 8, 16 and 32.

    P2, P3 and P4 come from the first block at their stride, P5 from the last block. The stem is a convolution and a
    batch norm without activation, the last convolution (of the classifier) is left out. Convolutions of stride 2 pad as
    those of the package efficientnet_pytorch, which are made for images of one size, the network's own (224 pixels for
    b0, 240 for b1, 260 for b2), whatever the size of the image that comes.

    Args:
        arch: 'b0' to 'b7'.
        norm_cfg: of all batch norms; efficientnet_pytorch's, unless given.
        kwargs: of ``mmpretrain.EfficientNet``, ``init_cfg`` among them.
    """

    def __init__(self, arch: str = 'b0', norm_cfg: Optional[dict] = None, **kwargs):
        norm_cfg = norm_cfg or dict(type='BN', eps=1e-3, momentum=0.01)
        super().__init__(arch, conv_cfg=dict(type='Conv2d'), norm_cfg=norm_cfg, **kwargs)
        del self.layers[-1]
        stem = self.layers[0]
        stem.with_activation = False
        size, strided = self.arch_setting[2], [stem.conv]
        strided += [b.depthwise_conv.conv for stage in self.layers[1:] for b in stage]
        for conv in strided:
            if conv.stride == (2, 2):
                if size % 2 == 0:  # "same" padding has a row less at the top and on the left
                    more = conv.padding[0]
                    conv.padding = (0, 0)
                    conv.register_forward_pre_hook(partial(_pad, (more - 1, more, more - 1, more)))
                size = math.ceil(size / 2)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Images ``[B, 3, H, W]``, normalised; returns P2, P3, P4, P5."""
        levels = []
        for i, stage in enumerate(self.layers):
            for j, block in enumerate(stage.children() if i else [stage]):
                x = block(x)
                if j == 0 and i in (2, 3, 4):
                    levels.append(x)
        return (*levels, x)


def _pad(sides: Tuple[int, int, int, int], module: nn.Module, inputs: Tuple[Tensor]) -> Tensor:
    return F.pad(inputs[0], sides)
