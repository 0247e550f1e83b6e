"""FRSKD for MMSegmentation's encoder-decoders: a self-teacher beside the decode head, in training only."""

from typing import Dict, List, Optional, Sequence, Tuple

import torch
from mmcv.cnn import ConvModule
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from mmseg.utils import SampleList, add_prefix
from torch import Tensor, nn

from selfkd.losses import attention_transfer, distillation_kl
from selfkd.pyramid import BiFPN
from selfkd.schedule import sigmoid_ramp_up
from selfkd.checks import at_least_zero

from .decode_head import losses_of, plain_loss

__all__ = ['ConvHead', 'FRSKDEncoderDecoder', 'SelfTeacher']


@MODELS.register_module()
class FRSKDEncoderDecoder(EncoderDecoder):
    """An ``EncoderDecoder`` that in training has a self-teacher on the feature maps that its decode head reads.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    Backbone, neck, decode head and auxiliary heads are those of the config, and keep their names: with the self-teacher
    dropped (``tools/publish_model.py``) its weights load strictly into that config; without it (``load_from``) training
    goes on from such weights. Inference does not call the self-teacher. Two settings over any config::

        model = dict(
            type='selfkd_mmseg.FRSKDEncoderDecoder',
            self_teacher=dict(in_channels=[256, 512, 1024, 2048]),
        )

    Args:
        self_teacher: options of :class:`SelfTeacher`; ``num_classes``, ``ignore_index``, ``align_corners``,
            ``norm_cfg``, ``loss_decode`` and ``sampler`` are the decode head's unless given.
        kwargs: of ``EncoderDecoder``.

    Raises:
        ValueError: for decode heads and losses that it does not support, and for class counts that differ.
    """

    def __init__(self, self_teacher: dict, **kwargs):
        head = kwargs['decode_head']
        if isinstance(head, (list, tuple)):
            raise ValueError(
                'FRSKDEncoderDecoder: one decode head is supported, not a cascade of several (CascadeEncoderDecoder)'
            )
        super().__init__(**kwargs)
        name = type(self.decode_head).__name__
        if not plain_loss(self.decode_head):
            raise ValueError(
                f'FRSKDEncoderDecoder: {name} is not supported: it needs a decode head that computes its loss as '
                'BaseDecodeHead does (FCN, PSP, DeepLabV3+, UPerNet, SegFormer, ...)'
            )
        # The loss that sees the logits; others beside it (Dice, ...) may be sigmoid ones.
        softmax = [loss for loss in losses_of(self.decode_head) if not getattr(loss, 'use_sigmoid', False)]
        if not softmax or self.out_channels != self.num_classes:
            names = [type(loss).__name__ for loss in losses_of(self.decode_head)]
            raise ValueError(
                f'FRSKDEncoderDecoder: {name} trains {self.out_channels} outputs with {names}, but the self-teacher '
                'teaches a softmax over classes: decode_head.loss_decode needs a loss with use_sigmoid=False, and '
                'decode_head.out_channels must be num_classes'
            )
        self._tapped = (softmax[0],)  # in a tuple: it is the decode head's sub-module, not ours
        given = {key: head[key] for key in ('norm_cfg', 'loss_decode', 'sampler') if key in head}
        same = {key: getattr(self.decode_head, key) for key in ('num_classes', 'ignore_index', 'align_corners')}
        if self_teacher.get('num_classes', self.num_classes) != self.num_classes:
            raise ValueError(
                f'FRSKDEncoderDecoder: self_teacher.num_classes is {self_teacher["num_classes"]}, but the decode head '
                f'has {self.num_classes} classes: leave it out, it is taken from there'
            )
        self.self_teacher = SelfTeacher(**{**given, **same, **self_teacher})

    def _decode_head_forward_train(self, inputs: List[Tensor], data_samples: SampleList) -> dict:
        """The decode head's losses, and under ``self_teacher.`` those of the self-teacher."""
        (loss_module,), calls = self._tapped, []
        # mmseg calls decode_head.forward itself, which torch hooks on decode_head do not see.
        tap = loss_module.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
        try:
            losses = super()._decode_head_forward_train(inputs, data_samples)
        finally:
            tap.remove()
        if len(calls) != 1:
            raise RuntimeError(
                f'FRSKDEncoderDecoder: {type(self.decode_head).__name__} called its loss {len(calls)} times in a '
                'training step, and not once: which logits to teach is not known; use another decode head'
            )
        avg_non_ignore = getattr(loss_module, 'avg_non_ignore', False)
        teachers = self.self_teacher.loss(inputs, data_samples, calls[0], avg_non_ignore)
        losses.update(add_prefix(teachers, 'self_teacher'))
        return losses


@MODELS.register_module()
class ConvHead(BaseDecodeHead):
    """The decode head of FRSKD's segmentation model: 3x3 convolution - batch norm - ReLU - 3x3 convolution.

    Args:
        in_channels: of the map that it reads, ``in_index``.
        channels: between the convolutions. The paper's are 256.
        kwargs: of ``BaseDecodeHead``; ``num_classes`` among them.
    """

    def __init__(self, in_channels: int, channels: int = 256, *, dropout_ratio: float = 0.0, **kwargs):
        super().__init__(in_channels, channels, dropout_ratio=dropout_ratio, **kwargs)
        settings = dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg or dict(type='BN'), act_cfg=self.act_cfg)
        self.conv = ConvModule(self.in_channels, channels, 3, padding=1, **settings)
        self.conv_seg = nn.Conv2d(channels, self.out_channels, 3, padding=1)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, num_classes, H, W]`` at the size of the map."""
        return self.cls_seg(self.conv(self._transform_inputs(inputs)))


class SelfTeacher(BaseModule):
    """FRSKD's self-teacher for segmentation: a :class:`selfkd.pyramid.BiFPN` and a :class:`ConvHead` on its finest map.

    Its losses are those of its classifier on the labels, and

    - ``loss_kd``: ``alpha`` times the KL of the student's prediction from the self-teacher's, summed over classes, 0 at
      ignored pixels, averaged over the pixels that the decode head's cross-entropy is averaged over,
    - ``loss_feature``: ``beta`` times attention transfer, summed over the levels,

    both times ``ramp``, which is 0 in the first ``warmup`` of the iterations and exp(-5 (1 - s)^2) in the rest, where s
    goes from 0 to 1. Outside mmengine's Runner it is 1.

    Args:
        in_channels: channels of the feature maps, fine to coarse; two or more.
        in_index: which maps, if not all.
        width: channels of every refined map. 64, 88 and 112 are the paper's for EfficientNet-b0, -b1 and -b2.
        depth: separable convolutions per fusion.
        repeats: BiFPN layers.
        channels: between the convolutions of the classifier.
        alpha: final weight of the KL.
        beta: final weight of attention transfer; 0 distils predictions only.
        warmup: share of training before both act, in [0, 1). The paper's is 40 of 60 epochs.
        kwargs: of the classifier: ``num_classes``, ``loss_decode``, ``norm_cfg``, ...
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_index: Optional[Sequence[int]] = None,
        width: int = 64,
        depth: int = 1,
        repeats: int = 2,
        channels: int = 256,
        alpha: float = 1.0,
        beta: float = 50.0,
        warmup: float = 2 / 3,
        **kwargs,
    ):
        if isinstance(in_channels, int) or len(in_channels) < 2:
            raise ValueError(f'self_teacher: in_channels must list those of 2 feature maps or more, got {in_channels}')
        if in_index is not None and len(in_index) != len(in_channels):
            raise ValueError(f'self_teacher: in_index must name {len(in_channels)} feature maps, got {in_index}')
        at_least_zero('self_teacher', alpha=alpha, beta=beta)
        if not 0 <= warmup < 1:
            raise ValueError(f'self_teacher: warmup must lie in [0, 1), got {warmup}')
        super().__init__()
        self.in_channels, self.in_index = list(in_channels), in_index
        self.alpha, self.beta, self.warmup = alpha, beta, warmup
        widths = [width] * len(self.in_channels)
        # The classifier reads the finest map: a last way up would teach what nothing trains.
        self.pyramid = BiFPN(self.in_channels, widths, depth=depth, repeats=repeats, last_top_down=True)
        self.head = ConvHead(width, channels, in_index=0, **kwargs)

    def forward(self, feats: Sequence[Tensor]) -> Tuple[List[Tensor], Tensor]:
        """The refined maps, and the logits at the size of the finest one."""
        maps = self.pyramid(self.select(feats))
        return maps, self.head(maps)

    def select(self, feats: Sequence[Tensor]) -> List[Tensor]:
        """The student's maps that it refines; refuses others than promised."""
        there = self.in_index is None or max(self.in_index) < len(feats)
        chosen = [feats[i] for i in self.in_index] if self.in_index is not None and there else list(feats)
        if not there or [f.shape[1] for f in chosen] != self.in_channels:
            raise ValueError(
                f'self_teacher: in_channels is {self.in_channels}, but the feature maps that reach the decode head '
                f'have {[f.shape[1] for f in feats]} channels: set in_channels to these, or choose some by in_index too'
            )
        return chosen

    def loss(
        self, feats: Sequence[Tensor], data_samples: SampleList, student_logits: Tensor, avg_non_ignore: bool
    ) -> Dict[str, Tensor]:
        """Losses of a batch.

        Args:
            feats: the student's maps.
            data_samples: with the labels.
            student_logits: the decode head's, ``[B, C, H, W]`` at the size of the labels.
            avg_non_ignore: whether averages are over the pixels that are not ignored, or over all of them.
        """
        maps, logits = self(feats)
        label = self.head._stack_batch_gt(data_samples)
        logits = resize(logits, label.shape[2:], mode='bilinear', align_corners=self.head.align_corners)
        weight = None if self.head.sampler is None else self.head.sampler.sample(logits, label)
        label, ignored, ramp = label.squeeze(1), self.head.ignore_index, self.ramp()
        kd = feature = student_logits.new_zeros(())
        if ramp and self.alpha:
            valid = label != ignored
            kl = distillation_kl(student_logits, logits, temperature=1.0, reduction='none') * valid
            kd = self.alpha * ramp * kl.sum() / (valid.sum().clamp(min=1) if avg_non_ignore else valid.numel())
        if ramp and self.beta:
            levels = [attention_transfer(f, m) for f, m in zip(self.select(feats), maps)]
            feature = self.beta * ramp * sum(levels)
        losses = {'loss_kd': kd, 'loss_feature': feature, 'ramp': torch.tensor(ramp)}
        # As BaseDecodeHead.loss_by_feat, without the accuracy, which costs a twelfth of a step on a CPU.
        for module in losses_of(self.head):
            own = module(logits, label, weight=weight, ignore_index=ignored)
            losses[module.loss_name] = losses.get(module.loss_name, 0) + own
        return losses

    def ramp(self) -> float:
        """The share of their final weights that ``alpha`` and ``beta`` have now."""
        hub = MessageHub.get_current_instance()
        total = hub.get_info('max_iters')
        since = (hub.get_info('iter') / total - self.warmup) / (1 - self.warmup) if total else 1.0
        return sigmoid_ramp_up(since) if since >= 0 else 0.0
