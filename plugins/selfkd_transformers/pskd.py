"""PS-KD as a mix-in of transformers' Trainer."""

import logging
import sys
from dataclasses import dataclass
from functools import partialmethod
from typing import Any, ClassVar, Dict, List, Optional

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from selfkd.options import check_options, choose_teacher
from selfkd.schedule import may_end_early
from selfkd_torch import TokenPSKD
from selfkd_torch.batches import Method

from .fused import FusedPSKD, output_layer
from .mixin import WAY_IN, MethodArguments, MethodMixin, logits_of, setting
from .numbered import why_no_index

__all__ = ['PSKDArguments', 'PSKDMixin', 'PSKDTrainer', 'PSKDTrainingArguments']

logger = logging.getLogger(__name__)

FUSED = 'set pskd_fused=True'
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}  # of mixed precision
WORDS = {  # what selfkd_torch calls it, and what it is here
    r' with model=, which': ', which',
    r'\b(alpha|teacher|teacher_mode|interval|ema_decay|top_k|bank_\w+)\b(?=[= ])': r'pskd_\1',
    r'raise max_epochs': 'raise num_train_epochs or max_steps',
    r'\bor set outputs=': "or use pskd_teacher='bank'",
    r'\bset outputs=, or compute its loss outside': 'compute the loss of the logits in compute_loss',
}


@dataclass
class PSKDArguments(MethodArguments):
    """PS-KD's settings, to be mixed into TrainingArguments of any kind; ``PSKDTrainingArguments`` is the usual."""

    name: ClassVar[str] = 'PSKD'
    off: ClassVar[Optional[str]] = 'pskd_alpha'

    pskd_alpha: float = setting(0.3, 'Share of the past in the target, grows up to it. 0: no PS-KD.')
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
    pskd_fused: bool = setting(False, 'Causal language models: the loss is computed without logits of all tokens.')


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
    pskd: Any = None  # selfkd_torch's TokenPSKD, as soon as training begins
    _kind = 'auto'  # of the past, as far as it is known before the first loss

    def _check(self) -> List[tuple]:
        settings, teacher, fused = self._settings(), self.args.pskd_teacher, self.args.pskd_fused
        check_options('PSKD', 'language models', settings)
        if not PSKDArguments.on(self.args):
            return super()._check()
        return [
            *super()._check(),
            ('use_liger_kernel', self._liger and not fused, f'its fused loss never has the logits: {FUSED}'),
            (f'pskd_teacher={teacher}', self._sharded and teacher in ('snapshot', 'ema'), 'use the bank'),
            (f'pskd_fused beside pskd_teacher={teacher}', fused and teacher in ('snapshot', 'ema'), 'use the bank'),
            ('pskd_fused under DeepSpeed or FSDP', fused and self._sharded, 'no process has the whole output layer'),
            ('label_smoothing_factor beside pskd_fused', fused and self.label_smoother, 'leave one of them out'),
            ('compute_loss_func beside pskd_fused', fused and self.compute_loss_func, 'leave one of them out'),
        ]

    def _settings(self) -> Dict[str, Any]:
        settings = PSKDArguments.settings(self.args)
        del settings['fused']
        return settings

    @property
    def _liger(self) -> bool:
        return self.args.use_liger_kernel and (self.args.liger_kernel_config or {}).get(
            'fused_linear_cross_entropy', True
        )

    def _words(self) -> Dict[str, str]:
        words = {**super()._words(), **WORDS}
        if self.args.pskd_fused:  # a loss of the logits of one token
            words[r'^Expected input batch_size.*'] = (
                "PSKD: with pskd_fused compute_loss must be the Trainer's: set pskd_fused=False"
            )
        return words

    @property
    def _sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _teacher(self, loader) -> str:
        """What is known before the first loss about ``pskd_teacher='auto'``."""
        teacher, obstacle = self.args.pskd_teacher, why_no_index(loader)
        if self._sharded:
            return choose_teacher(teacher, None)
        if self.args.pskd_interval:
            obstacle = 'pskd_interval refreshes a copy of the model'
        elif getattr(self.data_collator, 'mlm', False):
            obstacle = f'{type(self.data_collator).__name__} masks other tokens each time'
        return choose_teacher(teacher, obstacle) if obstacle else teacher

    def _by_rows(self, loader) -> Optional[tuple]:
        if PSKDArguments.on(self.args):
            self._kind = self._teacher(loader)
            if self._kind in ('auto', 'bank'):
                return 'PSKD', "use pskd_teacher='snapshot', or a DataLoader of a map-style data set"
        return super()._by_rows(loader)

    def _make(self) -> List[Method]:
        others = super()._make()
        if not PSKDArguments.on(self.args):
            return others
        args, state = self.args, self.state
        how, length = self._settings(), dict(max_epochs=state.num_train_epochs)
        how['teacher'] = self._kind
        if args.pskd_fused:
            if how['teacher'] not in ('auto', 'bank'):
                raise ValueError(
                    'PSKD: pskd_fused keeps a bank of tokens, which these data cannot have (the log says why): set '
                    'pskd_fused=False'
                )
            how['teacher'] = 'bank'
        elif how['teacher'] != 'bank':
            how.update(model=self.model, outputs=_outputs)
        if args.pskd_interval:
            length = dict(max_steps=state.max_steps)
        elif state.num_train_epochs == sys.maxsize:
            raise ValueError(
                'PSKD: how many epochs max_steps comes to is not known of data without a length, and alpha grows with '
                'them: give the data set a __len__, or set pskd_interval'
            )
        if args.pskd_fused:
            dtype = DTYPES.get(self.accelerator.mixed_precision)
            self.pskd = _FusedPSKD(self._data, head=output_layer(self.model), dtype=dtype, **length, **how)
            self.compute_loss_func = self.pskd.loss_of
        else:
            self.pskd = _PSKD(self._data, **length, **how)
            self.pskd.plain_is_wrong = any(kind.__name__ == 'SFTTrainer' for kind in type(self).__mro__)
        if any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks):
            training = f'{state.num_train_epochs} epochs'
            logger.warning(may_end_early('PSKD', args.pskd_alpha, training, ['EarlyStoppingCallback']))
        return [self.pskd, *others]

    def _look_at(self, inputs, rows: Optional[Tensor]) -> None:
        super()._look_at(inputs, rows)
        if self.args.pskd_fused and 'shift_labels' in inputs:
            raise ValueError('PSKD: pskd_fused shifts the labels, and the batch has shift_labels: set pskd_fused=False')
        labels = inputs.get('labels')
        if self.pskd is not None and 'start_positions' in inputs:
            self.pskd.answers, self.pskd.of_tokens = True, False
        elif self.pskd is not None and isinstance(labels, Tensor):
            if rows is None:
                self.pskd.of_tokens = labels.dim() > 1
            else:
                self.pskd.joined = len(labels) != len(rows)


def _outputs(output):
    if isinstance(output, dict) and 'start_logits' in output:  # question answering
        return output['start_logits'], output['end_logits']
    return logits_of(output)


class PSKDTrainer(PSKDMixin, Trainer):
    """A Trainer with PS-KD."""


class _PSKD(TokenPSKD):
    call, way_in = 'a cross-entropy', f'{WAY_IN}; or set pskd_alpha=0'
    tap = partialmethod(TokenPSKD.tap, check=False)
    plain_is_wrong = False  # in any batch, which is known of TRL's SFTTrainer
    answers = False  # whether samples have two labels, the start and the end of an answer

    def misfit(self, logits: Tensor, target: Tensor) -> Optional[str]:
        if self.answers:
            return 'a sample has two labels, where its answer starts and where it ends, and a bank keeps one prediction'
        return super().misfit(logits, target)

    def end_step(self) -> None:
        if self.plain_is_wrong and not self.used:
            raise RuntimeError(f"PSKD: TRL's SFTTrainer computes no cross-entropy of logits: {FUSED}")
        super().end_step()


class _FusedPSKD(FusedPSKD):
    call, way_in = (
        'compute_loss_func',
        'compute_loss must call it, as that of the Trainer does; or set pskd_fused=False',
    )
