"""What the mix-ins of transformers' Trainer have in common: its batches, its steps and its checkpoints."""

import math
import sys
from contextlib import ExitStack
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainerCallback

from selfkd.files import save
from selfkd.seeds import step_generator
from selfkd_torch import Batches
from selfkd_torch.batches import Method
from selfkd_torch.words import in_words

from .numbered import PARTNERS, ROWS, draw_partners, number

__all__ = ['WAY_IN', 'MethodArguments', 'MethodMixin', 'TrainersBatches', 'logits_of', 'saved_in', 'setting']

FILE = 'selfkd.pt'  # in a checkpoint's folder
WAY_IN = 'it must be torch.nn.functional.cross_entropy, of the model, in compute_loss or in compute_loss_func'
WORDS = {  # what selfkd_torch calls it, and what it is here
    r': name the loss module, as tap\(criterion\)': ': compute one, in compute_loss',
    r' \(To look at the data, go through the loader itself\.\)': '',
}


def setting(default, text: str):
    return field(default=default, metadata={'help': text})


class MethodArguments:
    """A method's settings, to be mixed into TrainingArguments.

    ``name`` is the method's, ``off`` the setting that switches it off by 0, and ``prefix`` what the settings' names
    begin with.
    """

    name: ClassVar[str] = ''
    off: ClassVar[Optional[str]] = None

    @classmethod
    def settings(cls, args) -> Dict[str, Any]:
        """As selfkd_torch has them."""
        prefix = f'{cls.name.lower()}_'
        return {name[len(prefix) :]: value for name, value in vars(args).items() if name.startswith(prefix)}

    @classmethod
    def on(cls, args) -> bool:
        return isinstance(args, cls) and not (cls.off and getattr(args, cls.off) == 0)

    @property
    def train_batch_size(self) -> int:
        """A Trainer asks for it when it is made: one without the mix-in would train plainly.

        Raises:
            ValueError: it has something to train on, and not the mix-in.
        """
        trainer: Any = sys._getframe(1).f_locals.get('self')
        if isinstance(trainer, Trainer) and trainer.train_dataset is not None:
            served, kind = [mixin.arguments for mixin in mixins(type(trainer))], type(trainer).__name__
            for wanted in type(self).__mro__:
                if 'name' in vars(wanted) and wanted.name and wanted not in served and wanted.on(self):
                    value = getattr(self, wanted.off) if wanted.off else None
                    value = wanted.__name__ if value is None else f'{wanted.off}={value}'
                    way_out = f'set {wanted.off}=0' if wanted.off else 'leave these arguments out'
                    raise ValueError(
                        f'{wanted.name}: args ask for it ({value}), but {kind} would train without it: use class '
                        f'MyTrainer({wanted.name}Mixin, {kind}), or {way_out}'
                    )
        return super().train_batch_size


def mixins(kind: type) -> List[type]:
    """Those of a Trainer's class."""
    return [c for c in kind.__mro__ if issubclass(c, MethodMixin) and 'arguments' in vars(c)]


class MethodMixin:
    """A method of ``selfkd_torch`` in a Trainer. Several go together: ``class T(PSKDMixin, CSKDMixin, Trainer)``.

    Nothing but ``training_step`` is changed; evaluation is plain. What the methods keep is saved in the checkpoint's
    folder, as ``selfkd.pt``.

    Raises:
        TypeError: a class that has a mix-in after the Trainer, which would never ask it.
        ValueError: for settings that cannot work or would never act, when the Trainer is made or training begins.
        RuntimeError: a training without a cross-entropy.
    """

    arguments: ClassVar[type]  # its part of args
    label_smoother: Any  # the Trainer's
    _methods: List[Method] = []  # while there is training
    _data: 'TrainersBatches'  # there as soon as methods are
    _resumed_from: Optional[str] = None

    # What a method says of itself, each beside what the others say.

    def _check(self) -> List[tuple]:
        """When the Trainer is made, with the method on: (setting, whether it is set, why it cannot be used here)."""
        return [
            ('several GPUs in one process', self.args.n_gpu > 1, 'use torchrun, one process for each'),
            ('dispatch_batches', self.accelerator.dispatch_batches, 'leave it out, so that rows stay with batches'),
            ('parallelism_config', getattr(self.accelerator, 'parallelism_config', None), 'batches are cut in pieces'),
            ('torch_compile', self.args.torch_compile, 'a compiled model hides the loss in it'),
        ]

    def _by_rows(self, loader) -> Optional[tuple]:
        """Why samples must have rows: the method, and the way out where they have none. None: they need not."""
        return None

    def _make(self) -> List[Method]:
        """The methods, over ``self._data``, when training begins."""
        return []

    def _words(self) -> Dict[str, str]:
        """For ``in_words``."""
        return WORDS

    def _end(self) -> None:
        """Training is over."""

    def _before_update(self) -> None:
        """The model's gradients are clipped, and a step of the optimizer is next."""

    def _look_at(self, inputs, rows: Optional[Tensor]) -> None:
        """At a batch of training, before its step."""

    # What the Trainer calls.

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        late = [kind for kind in mixins(cls) if Trainer in order and order.index(Trainer) < order.index(kind)]
        if late:
            name = late[0].__name__
            raise TypeError(
                f'{late[0].arguments.name}: {cls.__name__} has {name} after the Trainer, which would train without it: '
                f'write class {cls.__name__}({name}, Trainer)'
            )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for mixin in mixins(type(self)):
            wanted = mixin.arguments
            if not isinstance(self.args, wanted):
                raise ValueError(
                    f'{wanted.name}: args must be {wanted.name}TrainingArguments (or mix {wanted.__name__} in), got '
                    f'{type(self.args).__name__}'
                )
        with in_words(self._words()):
            wrong = self._check()
        if not self._names():
            return
        for name, is_set, why in wrong:
            if is_set:
                raise ValueError(f'{self._names()}: {name} cannot be used here: {why}')
        if self.label_smoother is not None:
            self.label_smoother = partial(smoothed_cross_entropy, self.label_smoother.epsilon)
        self.add_callback(_Epochs(self))

    def _names(self) -> str:
        """Of the methods that are on."""
        return ', '.join(kind.arguments.name for kind in mixins(type(self)) if kind.arguments.on(self.args))

    def _begin(self, loader, steps: int) -> None:
        """Training begins, on the batches of this loader, of which the Trainer takes so many steps in an epoch."""
        by_rows, checkpoint = self._by_rows(loader), self._resumed_from
        self._data = data = TrainersBatches(number(loader, *by_rows) if by_rows else (), self.state, steps)
        saved = saved_in(checkpoint) if checkpoint is not None else {}
        self._methods, self._resumed_from = self._make(), None
        if data.pairing is not None:
            draw_partners(loader, data)
        if checkpoint is not None:
            data.place()
        for method in self._methods:
            if method.name in saved:
                method.load_state_dict(saved[method.name])
            elif checkpoint is not None:
                method.resume_without_past(mid_period=self.state.global_step % (data.steps_per_epoch or steps) > 0)

    def training_step(self, model, inputs, *args, **kwargs):
        if not self._methods:
            if self._names():
                raise RuntimeError(
                    f'{self._names()}: training has not begun for the mix-in, so this step would be plain: train with '
                    "train(), whose loop calls the callback's on_train_begin, and leave the callbacks of the Trainer in"
                )
            return super().training_step(model, inputs, *args, **kwargs)
        data, rows = self._data, None
        if data.way_out:
            rows, partners = self._drawn(inputs)
            data.noted.append((rows, partners))
        with in_words(self._words()), ExitStack() as taps:
            self._look_at(inputs, rows)
            data.begin_step(dict(inputs))
            for method in self._methods:
                taps.enter_context(method.tap())
            loss = super().training_step(model, inputs, *args, **kwargs)
            data.end_step()
        return loss

    def _drawn(self, inputs) -> tuple:
        """Which samples a batch holds, and their partners (rows and batch), taken out of it."""
        if ROWS not in inputs:
            raise RuntimeError(
                f'{self._names()}: a batch came without {ROWS}, which says which samples are in it: what the loader '
                'gives must reach training_step'
            )
        rows, partners = torch.as_tensor(inputs.pop(ROWS)), inputs.pop(PARTNERS, None)
        if partners is None:
            return rows, None
        half = len(rows) // 2
        return rows[:half], (rows[half:], partners)

    def log(self, logs: Dict[str, float], *args, **kwargs) -> None:
        if 'loss' in logs:
            for method in self._methods:
                logs = {**logs, **{name: float(value) for name, value in method.logs.items()}}
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir) -> None:  # of a checkpoint, in all processes
        super()._save_optimizer_and_scheduler(output_dir)
        if self._methods:
            for method in self._methods:
                method.synchronize()
            if self.args.should_save:
                save({method.name: method.state_dict() for method in self._methods}, Path(output_dir, FILE))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint


class TrainersBatches(Batches):
    """The Trainer goes through its own loader: this knows the data, and what an epoch consists of.

    Args:
        loader: of the data set; ``()`` where that need not be known.
        state: the Trainer's.
        steps: of the optimizer in one of its epochs.
    """

    def __init__(self, loader, state, steps: int):
        super().__init__(loader)
        self.state, self.steps = state, steps

    def done(self) -> int:
        return self.state.global_step

    def place(self) -> None:
        # By steps, which is where the Trainer is: resumed with another batch size it is in another epoch.
        self.epoch = self.done() // (self.steps_per_epoch or self.steps)

    def partners_generator(self) -> torch.Generator:
        """By the Trainer's epochs, which a resumed run begins anew, whatever a period is."""
        return step_generator(self.seed, self.done() // self.steps)


class _Epochs(TrainerCallback):
    """Tells the methods where training is."""

    def __init__(self, trainer):
        self.trainer, self._step = trainer, 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        steps = 1
        if state.num_train_epochs != sys.maxsize:  # as the Trainer counts them
            steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        with in_words(self.trainer._words()):
            self.trainer._begin(train_dataloader, steps)
        self._step = self.trainer._data.step  # of an earlier train(), it may be the number that comes next

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._data.place()
        self.trainer._data.begin_epoch()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.trainer._before_update()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        step, self._step = self._step, self.trainer._data.step
        if step == self._step:
            name = type(self.trainer).__name__
            raise RuntimeError(
                f'{self.trainer._names()}: training was plain: {name}.training_step must call super().training_step'
            )
        self.trainer._data.after_update()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.trainer._end()

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        with in_words(self.trainer._words()):
            self.trainer._data.end_epoch(True)


def saved_in(checkpoint) -> Dict[str, Any]:
    """What each method has saved there."""
    path = Path(checkpoint, FILE)
    return torch.load(path, map_location='cpu', weights_only=True) if path.exists() else {}


def logits_of(output) -> Tensor:
    """``[N, C]``, of samples or of all tokens."""
    if isinstance(output, dict) and 'logits' not in output:
        raise ValueError(f'the model gives {", ".join(output)}, but no logits, so that it is not served')
    return (output['logits'] if isinstance(output, dict) else output[0]).flatten(0, -2)


def smoothed_cross_entropy(epsilon, model_output, labels, shift_labels=False, num_items_in_batch=None) -> Tensor:
    """The Trainer's LabelSmoother, by a call that can be softened."""
    if shift_labels:
        labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    logits = logits_of(model_output)
    return F.cross_entropy(logits, labels.flatten(), reduction='sum', label_smoothing=epsilon) / count
