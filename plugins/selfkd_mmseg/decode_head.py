"""What both methods ask of a decode head, and the one of FRSKD's segmentation model."""

from typing import Any, List, Optional, Sequence

from mmcv.cnn import build_norm_layer
from mmseg.models.decode_heads import DAHead, DDRHead, EncHead, PIDHead, PointHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn

__all__ = ['WHY_NOT', 'ConvHead', 'losses_of', 'place_of_prediction', 'plain_loss', 'predicting_head']

# Where the prediction is among the outputs of a head in training, by what computes its loss.
PLACES = {
    head.loss_by_feat: place
    for head, place in ((BaseDecodeHead, 0), (DAHead, 0), (DDRHead, 0), (EncHead, 0), (PIDHead, 1), (PointHead, 0))
}


# What the outputs of other heads are, where a message can say it.
_OF_QUERIES = 'it classifies the masks that its queries draw, and the past may draw another mask for a query'
WHY_NOT = {
    'IterativeDecodeHead': 'its kernels, as in K-Net, are refined from stage to stage, each with a loss of its own',
    'MaskFormerHead': _OF_QUERIES,
    'Mask2FormerHead': _OF_QUERIES,
    'SideAdapterCLIPHead': _OF_QUERIES,
    'VPDDepthHead': 'it predicts depth, and no classes',
}


def predicting_head(model: nn.Module) -> Any:
    """The decode head whose output is the prediction: of a cascade (OCRNet, PointRend) the last."""
    head = getattr(model, 'decode_head', None)
    return head[-1] if isinstance(head, nn.ModuleList) else head


def place_of_prediction(head: type) -> Optional[int]:
    """Where the prediction is among the outputs of heads of this type in training; None: it is not known."""
    return PLACES.get(getattr(head, 'loss_by_feat', None))


def plain_loss(head: type) -> bool:
    """Whether heads of this type compute their loss as ``BaseDecodeHead`` does: each loss module once, on the logits.

    Heads with a ``loss_by_feat`` of their own call their losses on several outputs, or on masks.
    """
    return getattr(head, 'loss_by_feat', None) is BaseDecodeHead.loss_by_feat


def losses_of(head: nn.Module) -> List[nn.Module]:
    return list(head.loss_decode) if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]


@MODELS.register_module()
class ConvHead(BaseDecodeHead):
    """The decode head of FRSKD's segmentation model: 3x3 convolution - batch norm - ReLU - 3x3 convolution.

    Initialised as torch initialises convolutions, as released.

    Args:
        in_channels: of the map that it reads, ``in_index``.
        channels: between the convolutions. The paper's are 256.
        norm_cfg: the released code's, unless given.
        kwargs: of ``BaseDecodeHead``; ``num_classes`` among them.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 256,
        *,
        norm_cfg: Optional[dict] = None,
        dropout_ratio: float = 0.0,
        init_cfg: Optional[dict] = None,
        **kwargs,
    ):
        super().__init__(in_channels, channels, dropout_ratio=dropout_ratio, init_cfg=init_cfg, **kwargs)
        norm = build_norm_layer(norm_cfg or dict(type='BN', eps=1e-4, momentum=0.997), channels)[1]
        self.conv = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), norm, nn.ReLU(inplace=True))
        self.conv_seg = nn.Conv2d(channels, self.out_channels, 3, padding=1)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, num_classes, H, W]`` at the size of the map."""
        return self.cls_seg(self.conv(self._transform_inputs(inputs)))
