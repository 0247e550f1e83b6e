"""PS-KD as a mix-in of transformers' Trainer."""

import logging
import sys
from dataclasses import dataclass
from functools import partialmethod
from typing import ClassVar, Dict, List, Optional

from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from selfkd.options import check_options, choose_teacher
from selfkd.schedule import may_end_early
from selfkd_torch import TokenPSKD
from selfkd_torch.batches import Method

from .mixin import WAY_IN, MethodArguments, MethodMixin, logits_of, setting
from .numbered import why_no_index

__all__ = ['PSKDArguments', 'PSKDMixin', 'PSKDTrainer', 'PSKDTrainingArguments']

logger = logging.getLogger(__name__)

WORDS = {  # what selfkd_torch calls it, and what it is here
    r' with model=, which': ', which',
    r'\b(alpha|teacher|teacher_mode|interval|ema_decay|top_k|bank_\w+)\b(?=[= ])': r'pskd_\1',
    r'raise max_epochs': 'raise num_train_epochs or max_steps',
    r'\bor set outputs=': "or use pskd_teacher='bank'",
    r'\bset outputs=, or compute its loss outside': 'compute the loss of the logits in compute_loss',
}


@dataclass
class PSKDArguments(MethodArguments):
    """PS-KD's settings, to be mixed into TrainingArguments of any kind; :class:`PSKDTrainingArguments` is the usual."""

    name: ClassVar[str] = 'PSKD'
    off: ClassVar[Optional[str]] = 'pskd_alpha'

    pskd_alpha: Optional[float] = setting(
        None, 'Share of the past in the target, grows up to it. 0: no PS-KD. Default: 0.3 of tokens, 0.8 of samples.'
    )
    pskd_teacher: str = setting(
        'auto', '"bank": kept predictions; "snapshot": the model of the last epoch, run anew; "ema": an average of it.'
    )
    pskd_teacher_mode: str = setting('train', 'How a copy runs: "train" (with dropout) or "eval".')
    pskd_interval: Optional[int] = setting(
        None, 'Steps of the optimizer after which a copy is refreshed. Default: an epoch.'
    )
    pskd_ema_decay: float = setting(0.999, 'Of "ema", for each step of the optimizer.')
    pskd_keep_hard: bool = setting(False, "Whether the label's term keeps its whole weight.")
    pskd_top_k: Optional[int] = setting(
        None, 'Classes that the bank keeps. Default: 8 of tokens (some drawn), all of samples.'
    )
    pskd_bank_dtype: Optional[str] = setting(None, 'Of the bank. Default: float16 of tokens, float32 of samples.')
    pskd_bank_device: Optional[str] = setting(None, "Of the bank. Default: the CPU for tokens, else the logits'.")
    pskd_bank_momentum: float = setting(0.0, 'Rows of a bank of samples become averages over the epochs.')


@dataclass
class PSKDTrainingArguments(PSKDArguments, TrainingArguments):
    """TrainingArguments with PS-KD's settings."""


class PSKDMixin(MethodMixin):
    """Progressive self-knowledge distillation in a Trainer: ``class MyTrainer(PSKDMixin, Trainer)``.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    The cross-entropy of a training step (the model's, of ``compute_loss``, label smoothing, ...) is softened by past
    predictions of samples (classification) or tokens (token classification, language models). What it is divided by
    stays the Trainer's business. Past predictions are saved in the checkpoint's folder as ``selfkd.pt``.

    Raises:
        TypeError: a class that has the mix-in after the Trainer, which would never ask it.
        ValueError: for settings that cannot work or would never act, when the Trainer is made or training begins.
        RuntimeError: a training step without a cross-entropy that could be softened.
    """

    arguments = PSKDArguments
    pskd: Optional[TokenPSKD] = None

    def _check(self) -> List[tuple]:
        settings, teacher = PSKDArguments.settings(self.args), self.args.pskd_teacher
        check_options('PSKD', 'language models', dict(settings, alpha=settings['alpha'] or 0.0))
        if not PSKDArguments.on(self.args):
            return super()._check()
        return [
            *super()._check(),
            ('use_liger_kernel', self.args.use_liger_kernel, 'its fused loss never has the logits'),
            (f'pskd_teacher={teacher}', self._sharded and teacher in ('snapshot', 'ema'), 'use the bank'),
        ]

    def _words(self) -> Dict[str, str]:
        return {**super()._words(), **WORDS}

    @property
    def _sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _teacher(self, loader) -> str:
        """What is known before the first loss about ``pskd_teacher='auto'``."""
        teacher = self.args.pskd_teacher
        if self._sharded:
            return choose_teacher(teacher, None)
        if self.args.pskd_interval:
            obstacle = 'pskd_interval refreshes a copy of the model'
        elif getattr(self.data_collator, 'mlm', False):
            obstacle = f'{type(self.data_collator).__name__} masks other tokens each time'
        else:
            obstacle = why_no_index(loader)
        return choose_teacher(teacher, obstacle) if obstacle else teacher

    def _by_rows(self, loader) -> Optional[tuple]:
        if PSKDArguments.on(self.args) and self._teacher(loader) in ('auto', 'bank'):
            return 'PSKD', "use pskd_teacher='snapshot', or a DataLoader of a map-style data set"
        return super()._by_rows(loader)

    def _make(self, loader, resumed: bool) -> List[Method]:
        others = super()._make(loader, resumed)
        if not PSKDArguments.on(self.args):
            return others
        args, state = self.args, self.state
        how, length = PSKDArguments.settings(args), dict(max_epochs=state.num_train_epochs)
        how['teacher'] = self._teacher(loader)
        if how['teacher'] != 'bank':
            how.update(model=self.model, outputs=logits_of)
        if args.pskd_interval:
            length = dict(max_steps=state.max_steps)
        elif state.num_train_epochs == sys.maxsize:
            raise ValueError(
                'PSKD: how many epochs max_steps comes to is not known of data without a length, and alpha grows with '
                'them: give the data set a __len__, or set pskd_interval'
            )
        self.pskd = _PSKD(self._data, **length, **how)
        if any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks):
            training = f'{state.num_train_epochs} epochs'
            logger.warning(
                may_end_early('PSKD', args.pskd_alpha or 'its final value', training, ['EarlyStoppingCallback'])
            )
        return [self.pskd, *others]

    def _look_at(self, inputs, rows: Optional[Tensor]) -> None:
        super()._look_at(inputs, rows)
        labels = inputs.get('labels')
        if self.pskd is not None and isinstance(labels, Tensor):
            if rows is None:
                self.pskd.of_tokens = labels.dim() > 1
            else:
                self.pskd.joined = len(labels) != len(rows)


class PSKDTrainer(PSKDMixin, Trainer):
    """A Trainer with PS-KD."""


class _PSKD(TokenPSKD):
    call, way_in = 'a cross-entropy', f'{WAY_IN}; or set pskd_alpha=0'
    tap = partialmethod(TokenPSKD.tap, check=False)
