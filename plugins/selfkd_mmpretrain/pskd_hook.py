"""PS-KD for MMPretrain classifiers."""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.runner import Runner
from mmpretrain.models.heads import ConformerHead
from mmpretrain.models.losses import LabelSmoothLoss
from mmpretrain.models.losses.utils import weight_reduce_loss
from mmpretrain.registry import HOOKS
from torch import Tensor, nn

from selfkd.bank import PredictionBank
from selfkd.losses import TopK, quality_focal_loss, soft_cross_entropy
from selfkd.past import BankPast
from selfkd.transfer import to_device
from selfkd_mmengine import PSKDHookBase, SampleIndex
from selfkd_mmengine.pskd_hook import is_sigmoid, probs_of

from .heads import ClassifierHook, head_of, logits_and_target, logits_of, mixes_samples

__all__ = ['PSKDHook']


@HOOKS.register_module()
class PSKDHook(ClassifierHook, PSKDHookBase):
    """Progressive self-knowledge distillation for any classifier whose head has a ``loss_module``.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    The target becomes ``(1 - alpha_t) * hard + alpha_t * past``, where *hard* is whatever target the head trains on
    (labels, smoothed labels, mixed ``gt_score``) and alpha_t grows linearly to ``alpha``. Where the loss has a sigmoid
    for each class (multi-label heads), so has the past. Of a head with several classifiers (Conformer) each learns from
    its own past. Nothing else of the config changes::

        default_hooks = dict(pskd=dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.3))

    Args:
        alpha: final share of the past prediction, in [0, 1]. Defaults to 0.3; the paper's is 0.8.
        teacher: where past predictions come from. ``'bank'`` keeps the prediction of each training sample from when it
            was last trained on (the paper's way, no extra forward pass). ``'snapshot'`` runs the previous epoch's model
            on the present inputs, and ``'ema'`` a moving average of the weights. ``'auto'`` takes the bank, or the
            snapshot where a prediction belongs to no single sample (with Mixup or CutMix, a data set whose samples have
            no index), is no distribution, or is one of two, or the number of classes is unknown. The log says which.
        teacher_mode, interval, ema_decay: of the past model, see [`selfkd_mmengine.PSKDHookBase`][].
        keep_hard: keep the whole weight of the label's loss, 1 instead of ``1 - alpha_t``.
        top_k: keep only the k largest probabilities of a prediction in the bank (see
            [`selfkd.bank.PredictionBank`][]). Defaults to all.
        bank_dtype: ``'float32'``, ``'float16'``, or ``'log8'``, a byte for each probability (``selfkd.storage``).
        bank_device: where the bank lives. Defaults to the model's device.
        bank_momentum: m in [0, 1): the bank keeps ``m * past + (1 - m) * prediction``, an average over epochs.

    Samples without a past (all in the first epoch) are trained on their hard target. Logged besides the loss:
    ``pskd_alpha``, ``pskd_hard`` and ``pskd_soft`` (the two weighted parts, which sum to the loss) and ``pskd_entropy``
    (mean entropy of the past predictions, in nats); ``pskd_skipped``, if there are any, counts predictions that were
    not finite (steps on an accelerator that overflowed) and did not enter the bank.

    Raises:
        ValueError: at the start of training, for what cannot work; each message says what to change.
    """

    own_losses = sigmoid = several = True

    def __init__(
        self,
        alpha: float = 0.3,
        *,
        teacher: str = 'auto',
        teacher_mode: str = 'train',
        interval: Optional[int] = None,
        ema_decay: float = 0.999,
        keep_hard: bool = False,
        top_k: Optional[int] = None,
        bank_dtype: str = 'float32',
        bank_device: Optional[str] = None,
        bank_momentum: float = 0.0,
    ):
        copy = dict(teacher_mode=teacher_mode, interval=interval, ema_decay=ema_decay)
        bank = dict(top_k=top_k, bank_dtype=bank_dtype, bank_device=bank_device, bank_momentum=bank_momentum)
        super().__init__(alpha, teacher=teacher, keep_hard=keep_hard, **copy, **bank)

    def check(self, runner: Runner, model: nn.Module) -> None:
        classes = getattr(runner.train_dataloader.dataset, 'metainfo', {}).get('classes')
        self.num_classes = getattr(head_of(model), 'num_classes', None) or len(classes or ())
        super().check(runner, model)
        if classes is not None and len(classes) != self.num_classes:
            raise ValueError(
                f'PSKDHook: the training set has {len(classes)} classes, the head {self.num_classes}: set '
                f'model.head.num_classes={len(classes)}'
            )

    def obstacle(self, runner: Runner, model: nn.Module) -> Tuple[Optional[str], str]:
        head = head_of(model)
        name = type(head).__name__
        if mixes_samples(model):
            return (
                'batch augmentations (Mixup, CutMix, ...) mix samples, so that a prediction belongs to no single one',
                ', or remove batch_augments from model.train_cfg / data_preprocessor',
            )
        if isinstance(head, ConformerHead):
            return f'the two classifiers of {name} give two predictions of a sample', ''
        if is_sigmoid(head.loss_module):
            return f'{name} predicts a sigmoid for each class, which is no distribution over the classes', ''
        if not self.num_classes:
            return (
                f'neither the head {name} nor the training set says how many classes there are',
                ', or metainfo=dict(classes=...) of the training set',
            )
        return SampleIndex.obstacle(runner.train_dataloader.dataset), ''

    def make_bank(self, runner: Runner, model: nn.Module) -> BankPast:
        self.sample_index = SampleIndex.of_training(runner)
        bank = PredictionBank(
            len(self.sample_index),
            self.num_classes,
            top_k=self.top_k,
            dtype=self.bank_dtype,
            device=self.bank_device or next(model.parameters()).device,
        )
        return BankPast(bank, momentum=self.bank_momentum, way_out="set teacher='snapshot'")

    def rows_of(self, runner: Runner, batch_idx: int, data_batch) -> Tensor:
        if batch_idx == 0:
            self.sample_index.check(runner.train_dataloader.dataset)
        return self.sample_index(data_batch)

    def after_train(self, runner: Runner) -> None:
        super().after_train(runner)
        if self.source == 'bank':
            self.sample_index.remove()

    def before_forward(self, inputs: Tensor) -> None:
        self.past.begin_forward(lambda model: self._probs(model, inputs))

    def _probs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """What a past copy predicts: ``[B, C, K]``, by each of K classifiers."""
        return torch.stack([probs_of(logits, self.tapped) for logits in logits_of(model, inputs)], -1)

    def check_batch(self, arguments: Dict[str, Any], loss: Tensor) -> None:
        super().check_batch(arguments, loss)
        if self.source == 'bank' and len(self._predictions) > 1:
            raise RuntimeError(
                f'PSKDHook: a head with {len(self._predictions)} predictions of a sample, each with a loss, and the '
                "bank keeps one: set teacher='snapshot'"
            )
        logits, label = logits_and_target(arguments)
        hard = self._losses(logits.detach(), _hard_targets(self.tapped, label, logits.shape[1]))
        self.check_cross_entropy(loss, self.reduced(weight_reduce_loss, hard, arguments))

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy of each sample with target probs ``[B, C]``, with the loss module's class weights: ``[B]``,
        or with a sigmoid for each class ``[B, C]``."""
        class_weight = getattr(getattr(self.tapped, 'ce', self.tapped), 'class_weight', None)
        if is_sigmoid(self.tapped):
            losses = quality_focal_loss(logits, target, gamma=0, reduction='none')
            return losses if class_weight is None else losses * losses.new_tensor(class_weight)
        return soft_cross_entropy(logits, target, class_weight=class_weight, reduction='none')

    def rewrite_loss(self, arguments: Dict[str, Any], loss: Tensor) -> Tensor:
        logits, label = logits_and_target(arguments)
        past = self.past.predict(label)
        skipped = getattr(self.past, 'skipped', 0)
        if skipped:
            self.logs['pskd_skipped'] = torch.tensor(float(skipped))
        self.past.observe(logits)
        if past is None or self.current_alpha == 0:
            self.logs['pskd_entropy'] = torch.zeros(())
            return self.mix(loss)
        past = past.to(logits.device)
        probs = past.probs.dense(logits.shape[1]) if isinstance(past.probs, TopK) else past.probs
        if probs.dim() == 3:  # a copy's
            probs = probs[..., self.place]
        soft, known = self._losses(logits, probs), torch.as_tensor(past.known)
        if not known.all():  # a sample without a past: its hard part counts whole
            hard = self._losses(logits, _hard_targets(self.tapped, label, logits.shape[1]))
            here = to_device(known, logits.device)
            soft = torch.where(here, soft, torch.zeros_like(hard) if self.keep_hard else hard)
        self.logs['pskd_entropy'] = self.entropy(past, logits.shape[1])
        return self.mix(loss, self.reduced(weight_reduce_loss, soft, arguments))


def _hard_targets(loss: nn.Module, label: Tensor, num_classes: int) -> Tensor:
    """The target that the loss module itself trains on, as probs ``[B, C]``."""
    if isinstance(loss, LabelSmoothLoss):
        return loss.smooth_label(loss.generate_one_hot_like_label(label))
    return label.float() if label.dim() == 2 else F.one_hot(label, num_classes).float()
