"""FRSKD for MMSegmentation's encoder-decoders: a self-teacher beside the decode head, in training only."""

import inspect
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from mmseg.utils import SampleList, add_prefix
from torch import Tensor, nn

from selfkd.checks import at_least_zero, positive
from selfkd.losses import frskd_loss
from selfkd.maps import as_map, last_of_each_size, outputs_of
from selfkd.pyramid import BiFPN, dry_run
from selfkd.schedule import sigmoid_ramp_up
from selfkd_mmengine import only_looks
from selfkd_mmengine.base_type import derived_from, find_base_type

from .decode_head import WHY_NOT, ConvHead, losses_of, plain_loss

__all__ = ['FRSKDEncoderDecoder', 'SelfTeacher']

# Segmentors that model.type replaces without a trace, known by what only they have.
OTHERS_OPTIONS = {'num_stages': 'CascadeEncoderDecoder', 'image_encoder': 'MultimodalEncoderDecoder'}
MAX_MAPS = 4  # inside a backbone; finer ones cost most
OTHERS_HEADS = {'SideAdapterCLIPHead': 'MultimodalEncoderDecoder', 'VPDDepthHead': 'DepthEstimator'}


@MODELS.register_module()
class FRSKDEncoderDecoder(EncoderDecoder):
    """An ``EncoderDecoder`` that in training has a self-teacher on the feature maps that reach its decode head.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    Backbone, neck, decode head and auxiliary heads are those of the config, and keep their names: with the self-teacher
    dropped (``selfkd publish``) its weights load strictly into that config; without it (``load_from``) training
    goes on from such weights. Inference does not call the self-teacher. One setting over any config::

        model = dict(type='selfkd_mmseg.FRSKDEncoderDecoder')

    Where these are not fine to coarse, one of each size is taken (U-Net, ICNet, BiSeNetV2: the one that the decode head
    reads, else the last), and where they are of one size only, the last maps of the sizes inside the backbone (ERFNet).

    Args:
        self_teacher: options of [`SelfTeacher`][], or of the ``type`` that it names. ``in_channels`` and
            ``in_index`` are found by running the network once on an empty image unless given; ``num_classes``,
            ``ignore_index``, ``align_corners``, ``norm_cfg``, ``loss_decode`` and ``sampler`` are the decode head's
            unless given. And ``base_type``: the type that the config had, where that is a class of your own made from
            ``EncoderDecoder``, which then does what it did.
        kwargs: of ``EncoderDecoder``, or ``base_type``.

    In evaluation mode or without gradients (a validation loss) the losses are those of the plain model.

    Raises:
        ValueError: for the options and heads of other segmentors, for decode heads and losses that it does not support,
            for class counts that differ, and for feature maps that are not fine to coarse.
    """

    def __new__(cls, self_teacher: Optional[dict] = None, **kwargs):
        if cls is FRSKDEncoderDecoder and kwargs:  # copies are made without arguments
            given = (self_teacher or {}).get('base_type')
            cls = derived_from(cls, find_base_type(cls, given, EncoderDecoder, MODELS, 'self_teacher.base_type'))
        return super().__new__(cls)

    def __init__(self, self_teacher: Optional[dict] = None, **kwargs):
        _check_replaces_encoder_decoder(kwargs, own_base=type(self) is not FRSKDEncoderDecoder)
        super().__init__(**kwargs)
        name = type(self.decode_head).__name__
        # The loss that sees the logits; others beside it (Dice, ...) may be sigmoid ones.
        softmax = [loss for loss in losses_of(self.decode_head) if not getattr(loss, 'use_sigmoid', False)]
        softmax.sort(key=lambda loss: not isinstance(loss, CrossEntropyLoss))
        if not softmax or self.out_channels != self.num_classes or self.num_classes < 2:
            names = [type(loss).__name__ for loss in losses_of(self.decode_head)]
            raise ValueError(
                f'FRSKDEncoderDecoder: {name} trains {self.out_channels} outputs with {names}, but the self-teacher '
                'teaches a softmax over classes: decode_head.loss_decode needs a loss with use_sigmoid=False, and '
                'decode_head.out_channels must be num_classes, two or more'
            )
        self._tapped = (softmax[0],)  # in a tuple: it is the decode head's sub-module, not ours
        options = dict(self_teacher or {})
        options.pop('base_type', None)
        if options.get('num_classes', self.num_classes) != self.num_classes:
            raise ValueError(
                f'FRSKDEncoderDecoder: self_teacher.num_classes is {options["num_classes"]}, but the decode head has '
                f'{self.num_classes} classes: leave it out, it is taken from there'
            )
        self._places: List[Tuple[str, Optional[int]]] = []  # of maps inside the backbone: module, and which output
        self._inside: Any = None  # these maps, between the backbone and the loss
        if 'in_channels' not in options:
            options.update(self._maps(kwargs, options.get('in_index')))
        head = kwargs['decode_head']
        given = {key: head[key] for key in ('norm_cfg', 'loss_decode', 'sampler') if key in head}
        same = {key: getattr(self.decode_head, key) for key in ('num_classes', 'ignore_index', 'align_corners')}
        self.self_teacher = MODELS.build({'type': SelfTeacher, **given, **same, **options})

    @torch.no_grad()
    def _maps(self, kwargs: dict, in_index: Optional[Sequence[int]]) -> Dict[str, Any]:
        """``in_index`` and ``in_channels`` of the maps to refine; refuses what a pyramid cannot refine."""
        with dry_run(self), outputs_of(self.backbone) as outputs:
            feats, size = self._look(kwargs, outputs)
        if not isinstance(feats, (list, tuple)) or not all(isinstance(f, Tensor) and f.dim() == 4 for f in feats):
            raise ValueError(
                f'FRSKDEncoderDecoder: {type(self.backbone).__name__} does not give a list of feature maps '
                '[B, C, H, W], which the self-teacher needs'
            )
        shapes = [tuple(f.shape[1:]) for f in feats]
        there = f'the feature maps that reach the decode head are (channels, height, width) {shapes}'
        if in_index is not None and (len(in_index) < 2 or any(not 0 <= i < len(feats) for i in in_index)):
            raise ValueError(
                f'FRSKDEncoderDecoder: {there}: the self-teacher needs two of them or more; choose them by '
                'self_teacher.in_index'
            )
        if _fine_to_coarse([shapes[i][1:] for i in in_index or range(len(feats))]):
            return dict(in_index=in_index, in_channels=[shapes[i][0] for i in in_index or range(len(feats))])
        if in_index is not None:
            raise ValueError(
                f'FRSKDEncoderDecoder: {there}: the self-teacher needs maps of several sizes, fine to coarse, but '
                f'self_teacher.in_index={in_index} are not; name some in that order'
            )
        read = self.decode_head.in_index if isinstance(self.decode_head.in_index, int) else None
        by_size = {shapes[i][1:]: i for i in sorted(range(len(feats)), key=lambda i: i == read)}
        sizes = sorted(by_size, reverse=True)
        if _fine_to_coarse(sizes):
            chosen = [by_size[size] for size in sizes]
            return dict(in_index=chosen, in_channels=[shapes[i][0] for i in chosen])
        found = last_of_each_size(outputs, size)
        places = [found[size] for size in sorted(found, reverse=True)][-MAX_MAPS:]
        if len(places) < 2:
            raise ValueError(
                f'FRSKDEncoderDecoder: {there}: the self-teacher needs maps of several sizes, and '
                f'{type(self.backbone).__name__} has none inside (ViTs and their like have maps of one size): use '
                'PSKDHook, or have the backbone give more (backbone.out_indices)'
            )
        self._places = [(place.module, place.index) for place in places]
        return dict(in_channels=[as_map(place.output, size).shape[1] for place in places])  # type: ignore[union-attr]

    def _look(self, kwargs: dict, outputs: list) -> Tuple[Sequence[Tensor], Tuple[int, int]]:
        """The feature maps of an empty image, and its size: a small one, or as large as in training for networks of
        fixed size."""
        channels, crop = kwargs['backbone'].get('in_channels', 3), (kwargs.get('data_preprocessor') or {}).get('size')
        for size in ((128, 128), crop):
            try:
                if size is not None:
                    outputs.clear()
                    return self.extract_feat(torch.zeros(1, channels, *size)), tuple(size)
            except Exception as error:  # of whatever network
                reason = error
        raise ValueError(
            f'FRSKDEncoderDecoder: {type(self.backbone).__name__} does not run on an empty image of {channels} '
            f"channels as EncoderDecoder runs it ({type(reason).__name__}: {reason}). If the config's model.type was "
            'another (change detection has networks of two images), name it in self_teacher.base_type; if it was '
            'EncoderDecoder, set self_teacher.in_channels to the channels of the feature maps'
        ) from reason

    def extract_feat(self, inputs: Tensor) -> Any:
        if not (self._places and self.training and torch.is_grad_enabled()):
            return super().extract_feat(inputs)
        with outputs_of(self.backbone, [name for name, _ in self._places]) as outputs:
            feats = super().extract_feat(inputs)
        given = dict(outputs)
        maps = (given[name] if index is None else given[name][index] for name, index in self._places)
        self._inside = [as_map(x, inputs.shape[2:]) for x in maps]
        return feats

    def _decode_head_forward_train(self, inputs: List[Tensor], data_samples: SampleList) -> dict:
        """The decode head's losses, and under ``self_teacher.`` those of the self-teacher."""
        if not (self.training and torch.is_grad_enabled()):
            return super()._decode_head_forward_train(inputs, data_samples)
        (loss_module,), calls = self._tapped, []
        if all(loss is not loss_module for loss in losses_of(self.decode_head)):
            raise RuntimeError(
                'FRSKDEncoderDecoder: decode_head.loss_decode was exchanged in the middle of the run, and the '
                'self-teacher would keep the old one: exchange it in a run of its own, with load_from'
            )

        def tap(module, args, kwargs):
            if not only_looks(kwargs):
                calls.append(args[0])

        # mmseg calls decode_head.forward itself, which torch hooks on decode_head do not see.
        handle = loss_module.register_forward_pre_hook(tap, with_kwargs=True)
        try:
            losses = super()._decode_head_forward_train(inputs, data_samples)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise RuntimeError(
                f'FRSKDEncoderDecoder: {type(self.decode_head).__name__} called its loss {len(calls)} times in a '
                'training step, and not once: which logits to teach is not known; use another decode head'
            )
        avg_non_ignore = getattr(loss_module, 'avg_non_ignore', False)
        feats, self._inside = (self._inside if self._places else inputs), None
        teachers = self.self_teacher.loss(feats, data_samples, calls[0], avg_non_ignore)
        losses.update(add_prefix(teachers, 'self_teacher'))
        return losses


def _fine_to_coarse(sizes: List[Tuple[int, ...]]) -> bool:
    """Of two sizes or more, none of which is larger than the one before."""
    return len(set(sizes)) > 1 and all(a >= b for s, t in zip(sizes, sizes[1:]) for a, b in zip(s, t))


def _check_replaces_encoder_decoder(kwargs: dict, own_base: bool) -> None:
    """``model.type`` has replaced the config's own type: EncoderDecoder, or one made from it that is named."""
    head = kwargs.get('decode_head')
    other = 'CascadeEncoderDecoder' if isinstance(head, (list, tuple)) else None
    unknown = [] if own_base else sorted(set(kwargs) - set(inspect.signature(EncoderDecoder).parameters))
    for option in unknown:
        other = OTHERS_OPTIONS.get(option, other)
    if other or unknown:
        raise ValueError(
            f'FRSKDEncoderDecoder: model.type replaces EncoderDecoder, but this model is {other or "of another type"} '
            f'({f"it has the options {unknown}" if unknown else "it has a list of decode heads"}), which FRSKD does '
            'not support: leave model.type as it is'
        )
    if head is None or 'backbone' not in kwargs:
        return  # EncoderDecoder names what is missing
    head = head['type'] if isinstance(head['type'], type) else MODELS.get(head['type'])
    if head is not None and not plain_loss(head):
        reason = f'it is a head of {OTHERS_HEADS[head.__name__]}; ' if head.__name__ in OTHERS_HEADS else ''
        reason += f'{WHY_NOT[head.__name__]}; ' if head.__name__ in WHY_NOT else ''
        raise ValueError(
            f'FRSKDEncoderDecoder: {head.__name__} is not supported ({reason}it needs a decode head that computes its '
            'loss as BaseDecodeHead does: FCN, PSP, DeepLabV3+, UPerNet, SegFormer, ...)'
        )


@MODELS.register_module()
class SelfTeacher(BaseModule):
    """FRSKD's self-teacher for segmentation: a [`selfkd.pyramid.BiFPN`][] and a [`ConvHead`][] on its finest map.

    Its losses are those of its classifier on the labels, and

    - ``loss_kd``: ``alpha`` times the temperature KL of the student's prediction from the self-teacher's, summed over
      classes, 0 at ignored pixels, averaged over the pixels that the decode head's cross-entropy is averaged over,
    - ``loss_feature``: ``beta`` times attention transfer, summed over the levels,

    both times ``ramp``, which is 0 in the first ``warmup`` of training and then exp(-5 (1 - s)^2), where s grows to 1:
    (e + 1 - W) / (E - W) in epoch e of E, W of them warm-up, constant within an epoch. Loops by iteration (and of one
    epoch) count iterations. Outside mmengine's Runner it is 1.

    Args:
        in_channels: channels of the feature maps, fine to coarse; two or more.
        alpha: final weight of the KL.
        beta: final weight of attention transfer; 0 distils predictions only.
        temperature: T of the KL.
        in_index: which maps, if not all.
        width: channels of every refined map.
        depth: separable convolutions per fusion.
        repeats: BiFPN layers; the last one goes top-down only, so that all that teaches is trained.
        channels: between the convolutions of the classifier.
        warmup: share of training before both act, in [0, 1). The paper's is 40 of 60 epochs.
        kwargs: of the classifier: ``num_classes``, ``loss_decode``, ``norm_cfg``, ...

    Raises:
        ValueError: settings out of range; at the first step, a warm-up that does not end before training does.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        alpha: float = 1.0,
        beta: float = 50.0,
        temperature: float = 1.0,
        in_index: Optional[Sequence[int]] = None,
        width: int = 64,
        depth: int = 1,
        repeats: int = 2,
        channels: int = 256,
        warmup: float = 2 / 3,
        **kwargs,
    ):
        if isinstance(in_channels, int) or len(in_channels) < 2:
            raise ValueError(f'self_teacher: in_channels must list those of 2 feature maps or more, got {in_channels}')
        if in_index is not None and len(in_index) != len(in_channels):
            raise ValueError(f'self_teacher: in_index must name {len(in_channels)} feature maps, got {in_index}')
        at_least_zero('self_teacher', alpha=alpha, beta=beta)
        positive('self_teacher', temperature=temperature)
        if not 0 <= warmup < 1:
            raise ValueError(f'self_teacher: warmup must lie in [0, 1), got {warmup}')
        super().__init__()
        self.in_channels, self.in_index = list(in_channels), in_index
        self.alpha, self.beta, self.temperature, self.warmup = alpha, beta, temperature, warmup
        self.pyramid = self.make_pyramid(width, depth, repeats)
        self.head = ConvHead(width, channels, in_index=0, **kwargs)

    def make_pyramid(self, width: int, depth: int, repeats: int) -> nn.Module:
        # The classifier reads the finest map, and maps that teach are constants.
        return BiFPN(
            self.in_channels, [width] * len(self.in_channels), depth=depth, repeats=repeats, last_top_down=True
        )

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
                f'have {[f.shape[1] for f in feats]} channels: leave in_channels out, or choose some maps by in_index'
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
        label, ramp, none = label.squeeze(1), self.ramp(), student_logits.new_zeros(())
        losses = {'loss_kd': none, 'loss_feature': none, 'ramp': torch.tensor(ramp)}
        if ramp and (self.alpha or self.beta):
            weights: Dict[str, Any] = dict(alpha=self.alpha * ramp, beta=self.beta * ramp, temperature=self.temperature)
            average = partial(self.average, label=label, avg_non_ignore=avg_non_ignore)
            chosen = self.select(feats)
            losses.update(frskd_loss(student_logits, logits, chosen, maps, None, **weights, average=average))
        # As BaseDecodeHead.loss_by_feat, without the accuracy, which costs a twelfth of a step on a CPU.
        for module in losses_of(self.head):
            own = module(logits, label, weight=weight, ignore_index=self.head.ignore_index)
            losses[module.loss_name] = losses.get(module.loss_name, 0) + own
        return losses

    def average(self, kl: Tensor, label: Tensor, avg_non_ignore: bool) -> Tensor:
        """One number for the KLs of the pixels of a batch."""
        valid = label != self.head.ignore_index
        return kl.masked_fill(~valid, 0).sum() / (valid.sum().clamp(min=1) if avg_non_ignore else valid.numel())

    def ramp(self) -> float:
        """The share of their final weights that ``alpha`` and ``beta`` have now."""
        hub = MessageHub.get_current_instance()
        unit = 'epoch' if (hub.get_info('max_epochs') or 1) > 1 else 'iter'
        total, now = hub.get_info(f'max_{unit}s'), hub.get_info(unit)
        if not total:
            return 1.0
        warmup = round(self.warmup * total, 6)
        if warmup > total - 1 and (self.alpha or self.beta):
            raise ValueError(
                f'self_teacher: warmup={self.warmup:.3g} of {total} {unit}s ends with training, so the self-teacher '
                f'would never teach: set self_teacher.warmup to {(total - 1) / total:.3g} or less'
            )
        return sigmoid_ramp_up((now + 1 - warmup) / (total - warmup)) if now >= warmup else 0.0
