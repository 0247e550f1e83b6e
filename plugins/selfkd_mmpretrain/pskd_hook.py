"""PS-KD for MMPretrain classifiers."""

from typing import Dict, Optional

import torch
import torch.nn.functional as F
from mmengine.runner import Runner
from mmpretrain.models.losses import LabelSmoothLoss
from mmpretrain.models.losses.utils import weight_reduce_loss
from mmpretrain.registry import HOOKS
from torch import Tensor, nn

from selfkd.bank import PredictionBank
from selfkd.bank_sync import exchange_rows
from selfkd.losses import soft_cross_entropy
from selfkd_mmengine import PSKDHookBase, SampleIndex
from selfkd_mmengine.hook import is_iter_based, saves_after_this_iter

from .heads import ClassifierHook, logits_and_target, logits_of

__all__ = ['PSKDHook']

DTYPES = {'float32': torch.float32, 'float16': torch.float16}


@HOOKS.register_module()
class PSKDHook(ClassifierHook, PSKDHookBase):
    """Progressive self-knowledge distillation for any classifier whose head has a ``loss_module``.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    The target becomes ``(1 - alpha_t) * hard + alpha_t * past``, where *hard* is whatever target the head trains on
    (labels, smoothed labels, mixed ``gt_score``) and alpha_t grows linearly to ``alpha``. Nothing else of the config
    changes::

        default_hooks = dict(pskd=dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8))

    Args:
        alpha: final share of the past prediction, in [0, 1]. Defaults to 0.8, the paper's.
        teacher: ``'bank'`` keeps the prediction each training sample got when it was last trained on (the paper's way,
            no extra forward pass); ``'snapshot'`` runs the previous epoch's model on the present inputs, the one to use
            with Mixup or CutMix. Samples without a past (the first epoch) are trained on their hard target.
        top_k: keep only the k largest probabilities of a prediction in the bank (see
            :class:`selfkd.bank.PredictionBank`). Defaults to all.
        bank_dtype: ``'float32'`` or ``'float16'``.
        bank_device: where the bank lives. Defaults to the model's device.
        interval: for ``'snapshot'`` in iteration-based loops: iterations between two refreshes of the past model.
            Defaults to one pass over the training set.
        teacher_mode: for ``'snapshot'``: the past model's: ``'train'``, as the network was when it trained (dropout,
            batch norm by the batch), or ``'eval'``.

    Logged besides the loss: ``pskd_alpha``, ``pskd_hard`` and ``pskd_soft`` (the two parts, which sum to the loss) and
    ``pskd_entropy`` (mean entropy of the past predictions, in nats); ``pskd_skipped``, if there are any, counts
    predictions that were not finite (steps on an accelerator that overflowed) and did not enter the bank.

    Raises:
        ValueError: at the start of training, for what cannot work; each message says what to change.
    """

    own_losses = True

    def __init__(
        self,
        alpha: float = 0.8,
        teacher: str = 'bank',
        top_k: Optional[int] = None,
        bank_dtype: str = 'float32',
        bank_device: Optional[str] = None,
        interval: Optional[int] = None,
        teacher_mode: str = 'train',
    ):
        if teacher not in ('bank', 'snapshot'):
            raise ValueError(f"PSKDHook: teacher must be 'bank' or 'snapshot', got {teacher!r}")
        if bank_dtype not in DTYPES:
            raise ValueError(f'PSKDHook: bank_dtype must be one of {list(DTYPES)}, got {bank_dtype!r}')
        if teacher == 'snapshot' and (top_k, bank_dtype, bank_device) != (None, 'float32', None):
            raise ValueError(
                "PSKDHook: top_k, bank_dtype and bank_device belong to teacher='bank', got teacher='snapshot'"
            )
        if teacher == 'bank' and teacher_mode != 'train':
            raise ValueError(
                "PSKDHook: teacher_mode belongs to teacher='snapshot'; the bank keeps predictions made in training, "
                f'got teacher_mode={teacher_mode!r}'
            )
        super().__init__(alpha, snapshot=teacher == 'snapshot', interval=interval, teacher_mode=teacher_mode)
        self.top_k, self.bank_dtype, self.bank_device = top_k, bank_dtype, bank_device
        self.bank: Optional[PredictionBank] = None

    def check(self, runner: Runner, model: nn.Module) -> None:
        super().check(runner, model)
        classes = getattr(runner.train_dataloader.dataset, 'metainfo', {}).get('classes')
        self.num_classes = getattr(model.head, 'num_classes', None) or len(classes or ())
        if not self.num_classes and not self.snapshot:
            raise ValueError(
                f'PSKDHook: neither the head {type(model.head).__name__} nor the training set says how many classes '
                "there are: set metainfo=dict(classes=...) of the training set, or teacher='snapshot'"
            )
        if classes is not None and len(classes) != self.num_classes:
            raise ValueError(
                f'PSKDHook: the training set has {len(classes)} classes, the head {self.num_classes}: set '
                f'model.head.num_classes={len(classes)}'
            )
        if not self.snapshot and getattr(model.data_preprocessor, 'batch_augments', None) is not None:
            raise ValueError(
                'PSKDHook: batch augmentations (Mixup, CutMix, ...) mix samples, so a prediction belongs to no single '
                "one: set teacher='snapshot', or remove batch_augments from model.train_cfg / data_preprocessor"
            )

    def setup(self, runner: Runner, model: nn.Module) -> None:
        super().setup(runner, model)
        if self.snapshot:
            return
        self.sample_index = SampleIndex.of_training(runner)
        self.bank = PredictionBank(
            len(self.sample_index),
            self.num_classes,
            top_k=self.top_k,
            dtype=DTYPES[self.bank_dtype],
            device=self.bank_device or next(model.parameters()).device,
        )
        if runner._resume and self._resumed_state is None:
            runner.logger.warning(
                'PSKDHook: the checkpoint holds no prediction bank (was it trained without this hook?); '
                'samples are trained on their hard targets until they are seen again'
            )
        self._written = []  # (indices, step) of what this rank wrote since the last exchange

    def before_train_iter(self, runner: Runner, batch_idx, data_batch=None) -> None:
        super().before_train_iter(runner, batch_idx, data_batch)
        self._probs = None
        if self.snapshot:
            return
        if batch_idx == 0:
            self.sample_index.check(runner.train_dataloader.dataset)
        self._indices = self.sample_index(data_batch)

    def before_forward(self, inputs: Tensor) -> None:
        if self.teacher_ready:
            self._past = self.teacher.run(logits_of, self.teacher.model, inputs).float().softmax(1)

    def check_batch(self, arguments: Dict[str, object], loss: Tensor) -> None:
        super().check_batch(arguments, loss)
        logits, label = logits_and_target(arguments)
        hard = self._soft(logits.detach(), _hard_targets(self.tapped, label, logits.shape[1]), arguments)
        self.check_cross_entropy(loss, hard)

    def _soft(self, logits: Tensor, target: Tensor, arguments: Dict[str, object]) -> Tensor:
        """The cross-entropy with target probs, weighted and reduced as the loss module's own."""
        class_weight = getattr(getattr(self.tapped, 'ce', self.tapped), 'class_weight', None)
        losses = soft_cross_entropy(logits, target, class_weight=class_weight, reduction='none')
        return self.reduced(weight_reduce_loss, losses, arguments)

    def rewrite_loss(self, arguments: Dict[str, object], loss: Tensor) -> Tensor:
        logits, label = logits_and_target(arguments)
        if not self.snapshot:
            self.bank.check_labels(self._indices, label, way_out="set teacher='snapshot'")
            self._probs = logits.detach().float().softmax(1)
            if self.bank.skipped:
                self.logs['pskd_skipped'] = torch.tensor(float(self.bank.skipped))
        past = self._past_targets(logits, label)
        if past is None or self.current_alpha == 0:
            self.logs.update(pskd_hard=loss.detach(), pskd_soft=torch.zeros(()), pskd_entropy=torch.zeros(()))
            return loss
        self.logs['pskd_entropy'] = torch.special.entr(past).sum(1).mean()
        return self.mix(loss, self._soft(logits, past, arguments))

    def _past_targets(self, logits: Tensor, label: Tensor) -> Optional[Tensor]:
        """Past predictions ``[B, C]``, the hard target for samples that have none; None if no sample has one."""
        if self.snapshot:
            return self._past if self.teacher_ready else None
        past, seen = self.bank.read(self._indices, return_seen=True)
        if not seen.any():
            return None
        past = past.to(logits.device, non_blocking=True)
        if not seen.all():
            hard = _hard_targets(self.tapped, label, logits.shape[1])
            past = torch.where(seen.to(logits.device, non_blocking=True)[:, None], past, hard)
        return past

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if self.snapshot:
            return
        self.bank.write(self._indices, self._probs)
        self._written.append((self._indices, runner.iter))
        ends_pass = is_iter_based(runner) and self.every_n_train_iters(runner, self.period)
        if ends_pass or saves_after_this_iter(runner):
            self._exchange()

    def before_val_epoch(self, runner: Runner) -> None:
        if self.bank is not None:  # the best checkpoint is saved after validation
            self._exchange()

    def after_train_epoch(self, runner: Runner) -> None:
        if not self.snapshot:
            self._exchange()

    def after_train(self, runner: Runner) -> None:
        super().after_train(runner)
        if not self.snapshot:
            self.sample_index.remove()

    def _exchange(self) -> None:
        none = torch.zeros(0, dtype=torch.long)  # a rank may have written nothing
        indices = torch.cat([none, *(indices for indices, _ in self._written)])
        steps = torch.cat([none, *(torch.full_like(indices, step) for indices, step in self._written)])
        exchange_rows(self.bank, indices, steps)
        self._written = []

    def state_dict(self, runner: Runner, next_iter: int) -> dict:
        return super().state_dict(runner, next_iter) if self.snapshot else {'bank': self.bank.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if self.bank is not None and 'bank' in state:
            self.bank.load_state_dict(state['bank'])


def _hard_targets(loss: nn.Module, label: Tensor, num_classes: int) -> Tensor:
    """The target that the loss module itself trains on, as probs ``[B, C]``."""
    if isinstance(loss, LabelSmoothLoss):
        return loss.smooth_label(loss.generate_one_hot_like_label(label))
    return label.float() if label.dim() == 2 else F.one_hot(label, num_classes).float()
