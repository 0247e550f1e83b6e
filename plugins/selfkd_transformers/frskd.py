"""FRSKD as a mix-in of transformers' Trainer."""

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, Optional

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import selfkd_torch
from selfkd.checks import at_least_zero, positive
from selfkd.defaults import FRSKD
from selfkd.teacher import random_state
from selfkd_torch.batches import Method
from selfkd_torch.frskd import FRSKDOfBatches
from selfkd_torch.words import in_words

from .mixin import WAY_IN, MethodArguments, MethodMixin, saved_in, setting
from .numbered import first_batch

__all__ = ['FRSKDArguments', 'FRSKDMixin', 'FRSKDTrainer', 'FRSKDTrainingArguments']

WORDS = {  # what selfkd_torch calls it, and what it is here
    r'\blayers=': 'frskd_layers=',
    r'\blayers must\b': 'frskd_layers must',
    r': give a batch of its inputs as example=': '',
    r': give num_classes=': ', and is not served',
}


@dataclass
class FRSKDArguments(MethodArguments):
    """FRSKD's settings, to be mixed into TrainingArguments; ``FRSKDTrainingArguments`` is the usual."""

    name: ClassVar[str] = 'FRSKD'

    frskd_alpha: float = setting(FRSKD['alpha']['classification'], 'Of the KL from the self-teacher.')
    frskd_beta: float = setting(FRSKD['beta']['classification'], 'Of the attention transfer from its feature maps.')
    frskd_temperature: float = setting(FRSKD['temperature']['classification'], 'Of the KL.')
    frskd_layers: Optional[List[str]] = setting(
        None, 'Modules whose outputs are the feature maps, fine to coarse. Default: found by a look at a sample.'
    )


@dataclass
class FRSKDTrainingArguments(FRSKDArguments, TrainingArguments):
    """TrainingArguments with FRSKD's settings."""


class FRSKDMixin(MethodMixin):
    """Feature refinement via self-knowledge distillation in a Trainer: ``class MyTrainer(FRSKDMixin, Trainer)``.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    For models of images whose modules give feature maps ``[B, C, H, W]`` (ResNet, ConvNeXt, ...). The cross-entropy of
    a training step gets the terms added. The self-teacher is no part of the model: it is saved in ``selfkd.pt``, and
    its weights are trained in the first group of the optimizer. ``max_grad_norm`` clips its gradients by themselves.

    Raises:
        TypeError: a class that has the mix-in after the Trainer, which would never ask it.
        ValueError: for settings and models that cannot work, when the Trainer is made or when training begins.
        RuntimeError: a training step without a cross-entropy, or with several.
    """

    arguments = FRSKDArguments
    frskd: Any = None  # selfkd_torch's FRSKD, as soon as training begins
    _taught: Optional[nn.Module] = None  # the model that frskd is of

    def _check(self) -> List[tuple]:
        args = self.args
        at_least_zero('FRSKD', frskd_alpha=args.frskd_alpha, frskd_beta=args.frskd_beta)
        positive('FRSKD', frskd_temperature=args.frskd_temperature)
        optim, sharded = getattr(args.optim, 'value', args.optim), self.is_deepspeed_enabled or self.is_fsdp_enabled
        layerwise = 'layerwise' in optim or 'lomo' in optim
        return [
            *super()._check(),
            ('DeepSpeed or FSDP', sharded, 'the self-teacher is no part of the model that they divide'),
            (f'optim={optim}', layerwise, 'it updates the layers of the model, and not the self-teacher'),
        ]

    def _words(self) -> Dict[str, str]:
        return {**super()._words(), **WORDS}

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._taught is not self.model:
            self._teach()
        params = optimizer.param_groups[0]['params']
        known = {id(param) for param in params}
        params.extend(param for param in self.frskd.parameters() if id(param) not in known)
        return optimizer

    def _teach(self) -> None:
        """Makes the self-teacher, which the model's maps in a sample give the shape of."""
        if self.frskd is not None:
            self.frskd.remove_hooks()
        with random_state(0, torch.device('cpu')):  # a look must not change what the samples to come draw
            batch = first_batch(self.get_train_dataloader())
        name = self.model.main_input_name
        if name not in batch:
            raise ValueError(f'FRSKD: the data give {", ".join(batch)}, but not {name}, which the model is called with')
        with in_words(self._words()):
            settings = FRSKDArguments.settings(self.args)
            self.frskd = selfkd_torch.FRSKD(self.model, example=batch[name], **settings)
        self._taught = self.model

    def _make(self) -> List[Method]:
        others = super()._make()
        if self._taught is not self.model:
            name = type(self).__name__
            raise RuntimeError(
                f'FRSKD: the self-teacher is not trained: {name}.create_optimizer must call super().create_optimizer'
            )
        self.frskd.add_hooks()
        self.frskd.self_teacher.zero_grad()  # of a train() that was interrupted
        return [_FRSKD(self), *others]

    def _end(self) -> None:
        super()._end()
        self.frskd.remove_hooks()

    def _before_update(self) -> None:
        super()._before_update()
        if self.args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.frskd.parameters(), self.args.max_grad_norm)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is not None and 'FRSKD' not in saved_in(checkpoint):
            raise ValueError(
                f'FRSKD: {checkpoint} holds no self-teacher (it is of a training without FRSKD?): begin anew with its '
                'weights, without resume_from_checkpoint'
            )
        super()._load_optimizer_and_scheduler(checkpoint)


class _FRSKD(FRSKDOfBatches):
    way_in = WAY_IN

    def __init__(self, trainer):
        super().__init__(trainer._data, trainer.frskd)
        self.accelerator = trainer.accelerator

    def term(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        with self.accelerator.autocast():  # a loss that is not the model's own is computed outside
            return super().term(logits, target, **options)

    def after_update(self) -> None:
        self.frskd.self_teacher.zero_grad()  # the Trainer's are the model's


class FRSKDTrainer(FRSKDMixin, Trainer):
    """A Trainer with FRSKD."""
