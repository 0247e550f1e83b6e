"""PS-KD per pixel for MMSegmentation's encoder-decoders."""

from typing import Any, Dict, List, Optional

import torch
import torch.nn.functional as F
from mmengine.runner import Runner
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.losses.utils import weight_reduce_loss
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.registry import HOOKS
from torch import Tensor, nn

from selfkd.losses import soft_cross_entropy
from selfkd.past import Prediction
from selfkd_mmengine import PSKDHookBase, only_looks

from .decode_head import losses_of, plain_loss

__all__ = ['PSKDHook']


@HOOKS.register_module()
class PSKDHook(PSKDHookBase):
    """Progressive self-knowledge distillation of every pixel's class.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    A frozen past copy of the model (of the end of the previous period, or a moving average of its weights) labels the
    same crops as the student, and the target of the decode head's cross-entropy becomes
    ``(1 - alpha_t) * label + alpha_t * past``. Ignored pixels, samplers (OHEM), class weights and normalisation are the
    toolkit's own; auxiliary heads and further losses of the decode head keep their hard labels. Nothing else of the
    config changes::

        default_hooks = dict(pskd=dict(type='selfkd_mmseg.PSKDHook', alpha=0.3))

    Args:
        alpha: final share of the past prediction, in [0, 1]. In iteration-based loops it grows once in ``interval``.
            With 0.8, the paper's for classification, a small network was worse calibrated (docs/evidence.md).
        teacher: ``'snapshot'``, the weights at the end of the previous period, or ``'ema'``, a moving average of the
            weights. ``'auto'`` is the snapshot: pixels of random crops have no identity that a bank could go by.
        teacher_mode, interval, ema_decay: of the past copy, see :class:`selfkd_mmengine.PSKDHookBase`.
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
        return [loss for loss in losses_of(model.decode_head) if isinstance(loss, CrossEntropyLoss)]

    def check(self, runner: Runner, model: nn.Module) -> None:
        super().check(runner, model)
        head: Any = getattr(model, 'decode_head', None)
        if not isinstance(model, EncoderDecoder) or not plain_loss(type(head)):
            raise ValueError(
                f'PSKDHook: {type(model).__name__} with {type(head).__name__} is not supported: it needs an '
                'EncoderDecoder whose decode head computes its loss as BaseDecodeHead does (FCN, PSP, DeepLabV3+, '
                'UPerNet, SegFormer, ...)'
            )
        self.align_corners, self.ignore_index = head.align_corners, head.ignore_index
        tapped = self.loss_modules(model)
        if len(tapped) != 1 or tapped[0].use_sigmoid or tapped[0].use_mask:
            names = [type(loss).__name__ for loss in losses_of(head)]
            raise ValueError(
                f'PSKDHook: {type(head).__name__} trains with {names}, but a past prediction is a softmax over '
                'classes: decode_head.loss_decode must hold one CrossEntropyLoss with use_sigmoid=False'
            )

    def _tap(self, module, args, kwargs, output):
        return None if only_looks(kwargs) else super()._tap(module, args, kwargs, output)

    def before_forward(self, inputs: Tensor) -> None:
        # Logits as small as the copy gives them: probs of the labels' size are made at the loss.
        self.past.begin_forward(lambda model: model(inputs, mode='tensor'))

    def check_batch(self, arguments: Dict[str, Any], loss: Tensor) -> None:
        super().check_batch(arguments, loss)
        logits, label = list(arguments.values())[:2]
        options = dict(weight=self._class_weight(logits), ignore_index=self.ignore_index, reduction='none')
        hard = F.cross_entropy(logits.detach().float(), label, **options)
        self.check_cross_entropy(loss, self._averaged(hard, arguments))

    def rewrite_loss(self, arguments: Dict[str, Any], loss: Tensor) -> Tensor:
        logits, label = list(arguments.values())[:2]
        past = self.past.predict(label)
        if past is None or self.current_alpha == 0:
            self.logs['pskd_entropy'] = torch.zeros(())
            return self.mix(loss)
        assert isinstance(past.probs, Tensor)  # a copy's
        self.logs['pskd_entropy'] = Prediction(past.probs.float().softmax(1), True).entropy(logits.shape[1])
        past_logits = resize(past.probs, logits.shape[2:], mode='bilinear', align_corners=self.align_corners)
        class_weight = self._class_weight(logits)
        soft = soft_cross_entropy(logits, past_logits.float().softmax(1), class_weight=class_weight, reduction='none')
        return self.mix(loss, self._averaged(soft.masked_fill(label == self.ignore_index, 0), arguments))

    def _class_weight(self, logits: Tensor) -> Optional[Tensor]:
        weight = self.tapped.class_weight
        return None if weight is None else logits.new_tensor(weight).float()

    def _averaged(self, losses: Tensor, arguments: Dict[str, Any]) -> Tensor:
        """Losses of pixels ``[B, H, W]``, 0 at ignored ones, weighted and reduced as the loss module's own."""
        logits, label = list(arguments.values())[:2]
        factor = _avg_factor(self.tapped, self._class_weight(logits), label, label != self.ignore_index)
        return self.reduced(weight_reduce_loss, losses, {**arguments, 'avg_factor': factor})


def _avg_factor(module: CrossEntropyLoss, class_weight: Optional[Tensor], label: Tensor, valid: Tensor):
    """What mmseg's cross-entropy divides by: all pixels, or their class weights; without ignored ones if told so."""
    if module.reduction != 'mean':
        return None
    if class_weight is None:
        return valid.sum() if module.avg_non_ignore else label.numel()
    weights = class_weight[label]
    return (weights.masked_fill(~valid, 0) if module.avg_non_ignore else weights).sum()
