"""PS-KD as a mix-in of transformers' Trainer."""

import logging
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, MutableMapping, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from selfkd.files import save
from selfkd.options import check_options, choose_teacher
from selfkd.schedule import may_end_early
from selfkd_torch import Batches, TokenPSKD
from selfkd_torch.words import in_words

__all__ = ['PSKDArguments', 'PSKDMixin', 'PSKDTrainingArguments']

logger = logging.getLogger(__name__)

ROWS = 'selfkd_rows'  # the entry of a batch that says which samples it holds
FILE = 'selfkd.pt'  # in a checkpoint's folder
WORDS = {  # what selfkd_torch calls it, and what it is here
    r' with model=, which': ', which',
    r'\b(alpha|teacher|teacher_mode|interval|ema_decay|top_k|bank_\w+)\b(?=[= ])': r'pskd_\1',
    r'raise max_epochs': 'raise num_train_epochs or max_steps',
    r'\bor set outputs=': "or use pskd_teacher='bank'",
    r'\bset outputs=, or compute its loss outside': 'compute the loss of the logits in compute_loss',
}
INSIDE = 'selfkd_inside'  # the attribute of a numbered data set that is the data set


def _setting(default, text: str):
    return field(default=default, metadata={'help': text})


@dataclass
class PSKDArguments:
    """PS-KD's settings, to be mixed into TrainingArguments of any kind; :class:`PSKDTrainingArguments` is the usual."""

    pskd_alpha: Optional[float] = _setting(
        None, 'Share of the past in the target, grows up to it. 0: no PS-KD. Default: 0.3 of tokens, 0.8 of samples.'
    )
    pskd_teacher: str = _setting(
        'auto', '"bank": kept predictions; "snapshot": the model of the last epoch, run anew; "ema": an average of it.'
    )
    pskd_teacher_mode: str = _setting('train', 'How a copy runs: "train" (with dropout) or "eval".')
    pskd_interval: Optional[int] = _setting(
        None, 'Steps of the optimizer after which a copy is refreshed. Default: an epoch.'
    )
    pskd_ema_decay: float = _setting(0.999, 'Of "ema", for each step of the optimizer.')
    pskd_keep_hard: bool = _setting(False, "Whether the label's term keeps its whole weight.")
    pskd_top_k: Optional[int] = _setting(
        None, 'Classes that the bank keeps. Default: 8 of tokens (some drawn), all of samples.'
    )
    pskd_bank_dtype: Optional[str] = _setting(None, 'Of the bank. Default: float16 of tokens, float32 of samples.')
    pskd_bank_device: Optional[str] = _setting(None, "Of the bank. Default: the CPU for tokens, else the logits'.")
    pskd_bank_momentum: float = _setting(0.0, 'Rows of a bank of samples become averages over the epochs.')

    def _pskd_settings(self) -> Dict[str, Any]:
        """As selfkd_torch has them."""
        return {name[5:]: value for name, value in vars(self).items() if name.startswith('pskd_')}

    @property
    def train_batch_size(self) -> int:
        """A Trainer asks for it when it is made: one without the mix-in would train plainly.

        Raises:
            ValueError: it has something to train on, and not the mix-in.
        """
        trainer: Any = sys._getframe(1).f_locals.get('self')
        plain = isinstance(trainer, Trainer) and not isinstance(trainer, PSKDMixin)
        if plain and self.pskd_alpha != 0 and trainer.train_dataset is not None:
            raise ValueError(
                f'PSKD: args ask for PS-KD (pskd_alpha={self.pskd_alpha}), but {type(trainer).__name__} would train '
                f'plainly: use class MyTrainer(PSKDMixin, {type(trainer).__name__}), or set pskd_alpha=0'
            )
        return super().train_batch_size


@dataclass
class PSKDTrainingArguments(PSKDArguments, TrainingArguments):
    """TrainingArguments with PS-KD's settings."""


class PSKDMixin:
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

    pskd: Optional[TokenPSKD] = None
    _data: '_Batches'  # there as soon as pskd is
    _resumed_from: Optional[str] = None
    label_smoother: Any  # the Trainer's

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(PSKDMixin):
            raise TypeError(
                f'PSKD: {cls.__name__} has PSKDMixin after the Trainer, which would train plainly: '
                f'write class {cls.__name__}(PSKDMixin, Trainer)'
            )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        settings = self.args
        if not isinstance(settings, PSKDArguments):
            raise ValueError(
                f'PSKD: args must be PSKDTrainingArguments (or mix PSKDArguments in), got {type(settings).__name__}'
            )
        with in_words(WORDS):
            check_options('PSKD', 'language models', dict(settings._pskd_settings(), alpha=settings.pskd_alpha or 0.0))
        if settings.pskd_alpha == 0:
            return
        teacher, sharded = settings.pskd_teacher, self.is_deepspeed_enabled or self.is_fsdp_enabled
        for name, wrong, why in (
            ('use_liger_kernel', settings.use_liger_kernel, 'its fused loss never has the logits'),
            ('torch_compile', settings.torch_compile, 'a compiled model hides the loss in it'),
            ('several GPUs in one process', settings.n_gpu > 1, 'use torchrun, one process for each'),
            ('dispatch_batches', self.accelerator.dispatch_batches, 'leave it out, so that rows stay with batches'),
            ('parallelism_config', getattr(self.accelerator, 'parallelism_config', None), 'batches are cut in pieces'),
            (f'pskd_teacher={teacher}', sharded and teacher in ('snapshot', 'ema'), 'use the bank'),
        ):
            if wrong:
                raise ValueError(f'PSKD: {name} cannot be used here: {why}')
        if self.label_smoother is not None:
            self.label_smoother = partial(_smoothed_cross_entropy, self.label_smoother.epsilon)
        self.add_callback(_Epochs(self))

    def training_step(self, model, inputs, *args, **kwargs):
        if self.pskd is None:
            return super().training_step(model, inputs, *args, **kwargs)
        if self._data.way_out:
            self._data.noted.append((self._rows_of(inputs), None))
        elif isinstance(inputs.get('labels'), Tensor):
            self.pskd.of_tokens = inputs['labels'].dim() > 1
        with in_words(WORDS):
            self._data.begin_step()
            with self.pskd.tap(check=False):
                loss = super().training_step(model, inputs, *args, **kwargs)
            self._data.end_step()
        return loss

    def log(self, logs: Dict[str, float], *args, **kwargs) -> None:
        if self.pskd is not None and 'loss' in logs:
            logs = {**logs, **{name: float(value) for name, value in self.pskd.logs.items()}}
        super().log(logs, *args, **kwargs)

    def _rows_of(self, inputs) -> Tensor:
        """Which samples a batch holds, taken out of it."""
        if ROWS not in inputs:
            raise RuntimeError(
                f'PSKD: a batch came without {ROWS}, which says which samples are in it: what the loader gives must '
                "reach training_step, or use pskd_teacher='snapshot'"
            )
        assert self.pskd is not None  # training_step has seen to it
        rows, labels = torch.as_tensor(inputs.pop(ROWS)), inputs.get('labels')
        self.pskd.joined = isinstance(labels, Tensor) and len(labels) != len(rows)
        return rows

    def _save_optimizer_and_scheduler(self, output_dir) -> None:  # of a checkpoint, in all processes
        super()._save_optimizer_and_scheduler(output_dir)
        if self.pskd is not None:
            self.pskd.synchronize()
            if self.args.should_save:
                save(self.pskd.state_dict(), Path(output_dir, FILE))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint


class _PSKD(TokenPSKD):
    call = 'a cross-entropy'
    way_in = (
        'it must be torch.nn.functional.cross_entropy, of the model, in compute_loss or in compute_loss_func; or set '
        'pskd_alpha=0'
    )


class _Batches(Batches):
    """The Trainer goes through its own loader: this knows the data, and what an epoch consists of."""

    def __init__(self, loader, state):
        super().__init__(loader)
        self.state = state

    def done(self) -> int:
        return self.state.global_step


class _Epochs(TrainerCallback):
    """Tells the method where training is."""

    def __init__(self, trainer: Trainer):
        self.trainer, self._step, self._steps = trainer, 0, 1

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        trainer, checkpoint = self.trainer, self.trainer._resumed_from
        how, length = args._pskd_settings(), dict(max_epochs=state.num_train_epochs)
        if state.num_train_epochs != sys.maxsize:  # as the Trainer counts them
            self._steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        how['teacher'] = teacher = self._teacher(args, train_dataloader)
        banks = teacher in ('auto', 'bank')
        trainer._data = _Batches(DataLoader(_number(train_dataloader)) if banks else (), state)
        if teacher != 'bank':
            how.update(model=trainer.model, outputs=_logits)
        if args.pskd_interval:
            length = dict(max_steps=state.max_steps)
        elif state.num_train_epochs == sys.maxsize:
            raise ValueError(
                'PSKD: how many epochs max_steps comes to is not known of data without a length, and alpha grows with '
                'them: give the data set a __len__, or set pskd_interval'
            )
        with in_words(WORDS):
            trainer.pskd = _PSKD(trainer._data, **length, **how)
        if checkpoint is not None:
            path, trainer._resumed_from = Path(checkpoint, FILE), None
            if path.exists():
                trainer.pskd.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
            else:
                self._place()
                period = args.pskd_interval or self._steps
                trainer.pskd.resume_without_past(mid_period=state.global_step % period > 0)
        if any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks):
            training = f'{state.num_train_epochs} epochs'
            logger.warning(
                may_end_early('PSKD', args.pskd_alpha or 'its final value', training, ['EarlyStoppingCallback'])
            )

    def _teacher(self, args, loader) -> str:
        """What is known before the first loss about ``pskd_teacher='auto'``."""
        teacher, obstacle = args.pskd_teacher, None
        if self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled:
            return choose_teacher(teacher, None)
        if args.pskd_interval:
            obstacle = 'pskd_interval refreshes a copy of the model'
        elif getattr(self.trainer.data_collator, 'mlm', False):
            obstacle = f'{type(self.trainer.data_collator).__name__} masks other tokens each time'
        else:
            obstacle = _why_no_index(loader)
        return choose_teacher(teacher, obstacle) if obstacle else teacher

    def _place(self) -> None:
        # By steps, which is where the Trainer is: resumed with another batch size it is in another epoch.
        data, state = self.trainer._data, self.trainer.state
        data.epoch = state.global_step // (data.steps_per_epoch or self._steps)

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self._place()
        self.trainer._data.begin_epoch()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        step, self._step = self._step, self.trainer._data.step
        if step == self._step:
            name = type(self.trainer).__name__
            raise RuntimeError(f'PSKD: training was plain: {name}.training_step must call super().training_step')
        self.trainer._data.after_update()

    @in_words(WORDS)
    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self.trainer._data.end_epoch(True)


def _why_no_index(loader) -> Optional[str]:
    loader = getattr(loader, 'base_dataloader', loader)  # that of Accelerate's wrapping
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return None
    kind = type(getattr(loader, 'dataset', loader)).__name__
    return f'the training data come from a {kind}, whose samples have no index'


def _number(loader) -> Dataset:
    """Has the loader, which the Trainer trains with, put the rows of the samples into its batches. The data set.

    It may come from a ``get_train_dataloader`` of the user's own. Data set and collate function are all that is
    exchanged, so sampler, workers and what Accelerate has made of the loader stay.
    """
    obstacle = _why_no_index(loader)
    if obstacle:
        raise ValueError(f"PSKD: {obstacle}: use pskd_teacher='snapshot', or a DataLoader of a map-style data set")
    loader = getattr(loader, 'base_dataloader', loader)
    dataset = loader.dataset
    if isinstance(dataset, _Numbered):  # of a loader that is used again
        return vars(dataset)[INSIDE]
    vars(loader).update(dataset=_Numbered(dataset), collate_fn=_Collate(loader.collate_fn, loader.batch_sampler))
    return dataset


class _Numbered:
    """A data set whose samples come with their indices. What is set on it is set on the data set."""

    def __init__(self, dataset):
        vars(self)[INSIDE] = dataset

    def __len__(self) -> int:
        return len(vars(self)[INSIDE])

    def __getitem__(self, index):
        return index, vars(self)[INSIDE][index]

    def __getitems__(self, indices: List) -> List:
        dataset = vars(self)[INSIDE]
        several = getattr(dataset, '__getitems__', None)
        return list(zip(indices, several(indices) if several else [dataset[index] for index in indices]))

    def __getattr__(self, name: str):
        if INSIDE not in vars(self):  # a copy that is being made
            raise AttributeError(name)
        return getattr(vars(self)[INSIDE], name)

    def __setattr__(self, name: str, value) -> None:
        setattr(vars(self)[INSIDE], name, value)


class _Collate:
    """The loader's own collate function, and beside what it makes of the samples their rows."""

    def __init__(self, collate: Callable, batched: bool):
        self.collate, self.batched = collate, batched

    def __call__(self, samples):
        indices, features = zip(*samples) if self.batched else samples
        batch = self.collate(list(features) if self.batched else features)
        if not isinstance(batch, MutableMapping):
            raise ValueError(f'PSKD: the collator must give a dict, got {type(batch).__name__}')
        batch[ROWS] = [int(index) for index in indices]  # a list: neither pinned nor moved to the accelerator
        return batch


def _logits(output) -> Tensor:
    """``[N, C]``, of samples or of all tokens."""
    if isinstance(output, dict) and 'logits' not in output:
        raise ValueError(
            f'PSKD: the model gives {", ".join(output)}, but no logits that a past prediction could be of (question '
            'answering?): such a model is not served'
        )
    return (output['logits'] if isinstance(output, dict) else output[0]).flatten(0, -2)


def _smoothed_cross_entropy(epsilon, model_output, labels, shift_labels=False, num_items_in_batch=None) -> Tensor:
    """The Trainer's LabelSmoother, by a call that can be softened."""
    if shift_labels:
        labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    logits = _logits(model_output)
    return F.cross_entropy(logits, labels.flatten(), reduction='sum', label_smoothing=epsilon) / count
