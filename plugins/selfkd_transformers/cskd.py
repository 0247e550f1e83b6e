"""CS-KD as a mix-in of transformers' Trainer."""

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, Mapping, Optional

from transformers import Trainer, TrainingArguments

import selfkd_torch
from selfkd.checks import at_least_zero, positive
from selfkd.defaults import CSKD
from selfkd_torch.batches import Method

from .mixin import WAY_IN, MethodArguments, MethodMixin, logits_of, setting
from .numbered import labels_of

__all__ = ['CSKDArguments', 'CSKDMixin', 'CSKDTrainer', 'CSKDTrainingArguments']

WORDS = {  # what selfkd_torch calls it, and what it is here
    r'has no attribute targets with a class for each of its samples: give them as labels=': (
        'has no class for each of its samples (labels, label or label_ids of a sample, or an attribute targets)'
    ),
    r'give the class ids that the loss sees as labels=': 'the data set must give the class ids that the loss sees',
    r': give it as inputs=, as in inputs=.*': ': override cskd_inputs',
    r' given as model= was not called before the loss: .*': ' of the Trainer was not called before the loss',
}


@dataclass
class CSKDArguments(MethodArguments):
    """CS-KD's settings, to be mixed into TrainingArguments of any kind; [`CSKDTrainingArguments`][] is the usual."""

    name: ClassVar[str] = 'CSKD'
    off: ClassVar[Optional[str]] = 'cskd_weight'

    cskd_weight: float = setting(CSKD['weight'], "Of CS-KD's term. 0: no CS-KD.")
    cskd_temperature: float = setting(CSKD['temperature'], "Of CS-KD's two predictions.")


@dataclass
class CSKDTrainingArguments(CSKDArguments, TrainingArguments):
    """TrainingArguments with CS-KD's settings."""


class CSKDMixin(MethodMixin):
    """Class-wise self-knowledge distillation in a Trainer: ``class MyTrainer(CSKDMixin, Trainer)``.

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020
    https://arxiv.org/abs/2003.13964

    For models that classify samples. The cross-entropy of a training step gets the term added. A partner for each
    sample, of its class, is loaded beside each batch; partners go through the model in a pass of their own. Classes are
    those of the training set: its ``targets`` or its column of labels, else its samples' labels, which takes a pass
    over the data when training begins.

    Raises:
        TypeError: a class that has the mix-in after the Trainer, which would never ask it.
        ValueError: for settings and data that cannot work, when the Trainer is made, when training begins or in its
            first step.
        RuntimeError: a training step without a cross-entropy, or with several.
    """

    arguments = CSKDArguments

    def cskd_inputs(self, batch: Mapping[str, Any]) -> Dict[str, Any]:
        """What the model is called with for a batch of partners. To be overridden where ``compute_loss`` changes what
        the model gets."""
        labels = {'labels', 'num_items_in_batch'}
        return {name: value for name, value in batch.items() if name not in labels}

    def _check(self) -> List[tuple]:
        at_least_zero('CSKD', cskd_weight=self.args.cskd_weight)
        positive('CSKD', cskd_temperature=self.args.cskd_temperature)
        if not CSKDArguments.on(self.args):
            return super()._check()
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return [*super()._check(), ('DeepSpeed or FSDP', sharded, 'no process has the whole model for the partners')]

    def _words(self) -> Dict[str, str]:
        return {**super()._words(), **WORDS}

    def _by_rows(self, loader) -> Optional[tuple]:
        found = super()._by_rows(loader)
        if found or not CSKDArguments.on(self.args):
            return found
        return 'CSKD', 'partners are drawn from a map-style data set: give a DataLoader of one'

    def _make(self) -> List[Method]:
        others = super()._make()
        if not CSKDArguments.on(self.args):
            return others
        labels: Any = labels_of(self._data.loader.dataset)
        settings, seed = CSKDArguments.settings(self.args), self.args.data_seed
        cskd = selfkd_torch.CSKD(
            self._data,
            self.model,
            labels=labels,
            inputs=self.cskd_inputs,
            outputs=logits_of,
            seed=self.args.seed if seed is None else seed,
            **settings,
        )
        cskd.call, cskd.way_in = 'a cross-entropy', f'{WAY_IN}; or set cskd_weight=0'
        return [cskd, *others]


class CSKDTrainer(CSKDMixin, Trainer):
    """A Trainer with CS-KD."""
