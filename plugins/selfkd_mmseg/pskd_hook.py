"""PS-KD per pixel for MMSegmentation."""

from typing import Any, Dict, List, Optional

import torch
import torch.nn.functional as F
from mmcv.ops import point_sample
from mmengine.runner import Runner
from mmseg.models.decode_heads import DAHead, DDRHead, PIDHead, PointHead
from mmseg.models.losses import CrossEntropyLoss, OhemCrossEntropy
from mmseg.models.losses.utils import weight_reduce_loss
from mmseg.models.segmentors import BaseSegmentor
from mmseg.models.utils import resize
from mmseg.registry import HOOKS
from torch import Tensor, nn

from selfkd.losses import quality_focal_loss, soft_cross_entropy
from selfkd.past import Prediction
from selfkd.teacher import unwrap
from selfkd_mmengine import PSKDHookBase, only_looks
from selfkd_mmengine.pskd_hook import is_sigmoid, probs_of

from .decode_head import PLACES, WHY_NOT, losses_of, place_of_prediction, predicting_head

__all__ = ['PSKDHook']


@HOOKS.register_module()
class PSKDHook(PSKDHookBase):
    """Progressive self-knowledge distillation of every pixel's class.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    A frozen past copy of the model (of the end of the previous period, or a moving average of its weights) labels the
    same crops as the student, and the target of the decode head's cross-entropy becomes
    ``(1 - alpha_t) * label + alpha_t * past``. Ignored pixels, hard pixels (OHEM), class weights and normalisation are
    the toolkit's own. Where a loss has a sigmoid for each class (FastSCNN, binary segmentation with one output), so has
    the past. Of several heads or outputs (OCRNet, PointRend, DANet, EncNet, DDRNet, PIDNet) the one that predicts is
    taught; the others, auxiliary heads and further losses keep their hard labels. Nothing else of the config changes::

        default_hooks = dict(pskd=dict(type='selfkd_mmseg.PSKDHook', alpha=0.3))

    Args:
        alpha: final share of the past prediction, in [0, 1]. In iteration-based loops it grows once in ``interval``.
            With 0.8, the paper's for classification, a small network was worse calibrated (docs/evidence.md).
        teacher: ``'snapshot'``, the weights at the end of the previous period, or ``'ema'``, a moving average of the
            weights. ``'auto'`` is the snapshot: pixels of random crops have no identity that a bank could go by.
        teacher_mode, interval, ema_decay: of the past copy, see [`selfkd_mmengine.PSKDHookBase`][].
        keep_hard: keep the whole weight of the label's loss, 1 instead of ``1 - alpha_t``.

    Logged besides the losses: ``pskd_alpha``, ``pskd_hard`` and ``pskd_soft`` (the two weighted parts of the
    cross-entropy) and ``pskd_entropy`` (mean entropy of the copy's predictions at the size that it gives them, in
    nats).

    Raises:
        ValueError: at the start of training, for heads and losses that it does not support.
    """

    task = 'segmentation'
    no_bank = 'pixels of random crops keep no identity from one epoch to the next'

    def __init__(
        self,
        alpha: float = 0.3,
        *,
        teacher: str = 'auto',
        teacher_mode: str = 'train',
        interval: Optional[int] = None,
        ema_decay: float = 0.999,
        keep_hard: bool = False,
    ):
        copy = dict(teacher_mode=teacher_mode, interval=interval, ema_decay=ema_decay)
        super().__init__(alpha, teacher=teacher, keep_hard=keep_hard, **copy)

    def loss_modules(self, model: nn.Module) -> List[nn.Module]:
        head = predicting_head(model)
        losses = losses_of(head)
        if isinstance(head, (DDRHead, PIDHead)):  # a loss for each output
            losses = losses[PLACES[type(head).loss_by_feat] :][:1]
        return [loss for loss in losses if isinstance(loss, (CrossEntropyLoss, OhemCrossEntropy))]

    def check(self, runner: Runner, model: nn.Module) -> None:
        super().check(runner, model)
        head = predicting_head(model)
        place = place_of_prediction(type(head))
        if not isinstance(model, BaseSegmentor) or place is None:
            why = 'its outputs are not known to be one softmax or sigmoid over the classes of each pixel'
            raise ValueError(
                f'PSKDHook: {type(model).__name__} with {type(head).__name__} is not supported: '
                f'{WHY_NOT.get(type(head).__name__, why)}. Use a decode head with the loss of BaseDecodeHead (FCN, '
                'PSP, UPerNet, SegFormer, OCR, ...), DAHead, DDRHead, EncHead, PIDHead or PointHead, or train without '
                'this hook'
            )
        self.place, self.align_corners, self.ignore_index = place, head.align_corners, head.ignore_index
        self._calls_it_again = isinstance(head, DAHead)
        tapped = self.loss_modules(model)
        if len(tapped) != 1 or getattr(tapped[0], 'use_mask', False):
            names = [type(loss).__name__ for loss in losses_of(head)]
            raise ValueError(
                f'PSKDHook: {type(head).__name__} trains with {names}, but a past prediction is one of classes: '
                'decode_head.loss_decode must hold one CrossEntropyLoss with use_mask=False, or OhemCrossEntropy'
            )
        if is_sigmoid(tapped[0]) and tapped[0].class_weight is not None:
            raise ValueError(
                'PSKDHook: class_weight of a CrossEntropyLoss with use_sigmoid=True weights positive labels, which a '
                'past prediction does not have: remove class_weight from decode_head.loss_decode'
            )

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        head = predicting_head(unwrap(runner.model))
        if isinstance(head, PointHead):
            choose = head.get_points_train

            def noting(*args, **kwargs):
                self._points = choose(*args, **kwargs)
                return self._points

            head.get_points_train = noting  # its loss is not told where the points are

    def after_train(self, runner: Runner) -> None:
        super().after_train(runner)
        vars(predicting_head(unwrap(runner.model))).pop('get_points_train', None)

    def _tap(self, module, args, kwargs, output):
        if only_looks(kwargs) or (self._calls_it_again and module in self._taps):  # the first call has the prediction
            return None
        return super()._tap(module, args, kwargs, output)

    def before_forward(self, inputs: Tensor) -> None:
        self.past.begin_forward(lambda model: self._predict(model, inputs))

    def _predict(self, model: Any, inputs: Tensor) -> Tensor:
        """Logits, as small as the copy gives them: probs of the labels' size are made at the loss."""
        if isinstance(predicting_head(model), PointHead):  # it refines what the head before it says
            return model.encode_decode(inputs, [dict(img_shape=inputs.shape[2:])] * len(inputs))
        output = model(inputs, mode='tensor')
        return output[self.place] if isinstance(output, (tuple, list)) else output

    def check_batch(self, arguments: Dict[str, Any], loss: Tensor) -> None:
        super().check_batch(arguments, loss)
        logits, label = list(arguments.values())[:2]
        of_class = label.masked_fill(self._ignored(label), 0)
        ids = of_class.unsqueeze(1) if logits.shape[1] == 1 else F.one_hot(of_class, logits.shape[1]).movedim(-1, 1)
        self.check_cross_entropy(loss, self._loss(logits.detach(), label, ids.float(), arguments))

    def rewrite_loss(self, arguments: Dict[str, Any], loss: Tensor) -> Tensor:
        logits, label = list(arguments.values())[:2]
        past = self.past.predict(label)
        if past is None or self.current_alpha == 0:
            self.logs['pskd_entropy'] = torch.zeros(())
            return self.mix(loss)
        assert isinstance(past.probs, Tensor)  # a copy's
        found = Prediction(probs_of(past.probs, self.tapped), True)
        self.logs['pskd_entropy'] = self.entropy(found, logits.shape[1])
        if logits.dim() == 3:
            past_logits = point_sample(past.probs, self._points, align_corners=self.align_corners)
        else:
            past_logits = resize(past.probs, logits.shape[2:], mode='bilinear', align_corners=self.align_corners)
        return self.mix(loss, self._loss(logits, label, probs_of(past_logits, self.tapped), arguments))

    def _ignored(self, label: Tensor) -> Tensor:
        return label == getattr(self.tapped, 'ignore_label', self.ignore_index)

    def _loss(self, logits: Tensor, label: Tensor, probs: Tensor, arguments: Dict[str, Any]) -> Tensor:
        """What the loss module would give for target probs ``[B, C, ...]`` in the place of the labels ``[B, ...]``.

        The pixels that count, and how much each does, are those that the module takes by the labels.
        """
        module, valid = self.tapped, ~self._ignored(label)
        if is_sigmoid(module):
            losses, each = quality_focal_loss(logits, probs, gamma=0, reduction='none'), valid.unsqueeze(1)
            of_valid = module.reduction == 'mean' and module.avg_non_ignore
            arguments = {**arguments, 'avg_factor': valid.sum() * logits.shape[1] if of_valid else None}
            return self.reduced(weight_reduce_loss, losses.masked_fill(~each, 0), arguments)
        weight = None if module.class_weight is None else logits.new_tensor(module.class_weight).float()
        losses = soft_cross_entropy(logits, probs, class_weight=weight, reduction='none')
        if isinstance(module, OhemCrossEntropy):
            hard = _hard_pixels(module, logits.detach(), label, valid)
            return module.loss_weight * losses[hard].mean() if valid.any() else losses.sum() * 0
        factor = _avg_factor(module, weight, label, valid)
        losses = losses.masked_fill(~valid, 0)
        return self.reduced(weight_reduce_loss, losses, {**arguments, 'avg_factor': factor})


def _hard_pixels(module: OhemCrossEntropy, logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Which pixels ``[B, H, W]`` the module averages over: those whose label is least probable."""
    probs = logits.softmax(1).gather(1, label.masked_fill(~valid, 0).unsqueeze(1)).squeeze(1)
    ranked = probs[valid].sort().values
    at_least = ranked[min(module.min_kept, len(ranked) - 1)].clamp(min=module.thresh) if len(ranked) else module.thresh
    return valid & (probs < at_least)


def _avg_factor(module: CrossEntropyLoss, class_weight: Optional[Tensor], label: Tensor, valid: Tensor):
    """What mmseg's cross-entropy divides by: all pixels, or their class weights; without ignored ones if told so."""
    if module.reduction != 'mean':
        return None
    if class_weight is None:
        return valid.sum() if module.avg_non_ignore else label.numel()
    weights = class_weight[label]
    return (weights.masked_fill(~valid, 0) if module.avg_non_ignore else weights).sum()
