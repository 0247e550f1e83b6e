"""CS-KD in a training loop of your own."""

from typing import Callable, Mapping, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.checks import at_least_zero, positive
from selfkd.losses import distillation_kl
from selfkd.pairing import SameClassPairing

from .batches import Batches, unwrap

__all__ = ['CSKD']


class CSKD:
    """Class-wise self-knowledge distillation: each sample learns from the prediction for another one of its class.

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020
    https://arxiv.org/abs/2003.13964

    The partners are drawn from the whole training set, loaded as a batch of their own, and go through the model in a
    pass of their own, in training mode and without gradient.

    Args:
        loader: the DataLoader of the training set, or another method's ``batches()``.
        model: the module that the loop calls.
        weight: lambda, at least 0.
        temperature: T. Defaults to 4, the paper's.
        labels: class id of every sample of the loader's data set; by default its ``targets``.
        inputs: gives the model's input from a batch, where that is not the batch's first entry.
        outputs: gives the logits from what the model returns, where that is not they.
        seed: of the partners.

    Raises:
        ValueError: for data whose classes are not known, and for settings out of range.

    Example:
        >>> images, labels, model = torch.randn(8, 4), torch.arange(8) % 2, nn.Linear(4, 2)
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
        >>> cskd = CSKD(loader, model, labels=labels)
        >>> for x, y in cskd.batches():
        ...     loss = cskd.loss(model(x), y)
    """

    def __init__(
        self,
        loader,
        model: nn.Module,
        *,
        weight: float = 1.0,
        temperature: float = 4.0,
        labels: Optional[Sequence[int]] = None,
        inputs: Optional[Callable] = None,
        outputs: Optional[Callable] = None,
        seed: int = 0,
    ):
        at_least_zero('CSKD', weight=weight)
        positive('CSKD', temperature=temperature)
        self.model, self.weight, self.temperature = model, weight, temperature
        self._inputs, self._outputs = inputs or _first, outputs or (lambda output: output)
        self.data = loader if isinstance(loader, Batches) else Batches(loader)
        dataset = getattr(self.data.loader, 'dataset', None)
        labels = getattr(dataset, 'targets', None) if labels is None else labels
        if labels is None or (hasattr(dataset, '__len__') and len(labels) != len(dataset)):
            raise ValueError(
                f'CSKD: partners are of one class, but {type(dataset).__name__} has no attribute targets with a class '
                f'for each of its samples: give them as labels=, got {None if labels is None else len(labels)}'
            )
        self.data.pair('CSKD', SameClassPairing(labels), seed)
        if any(isinstance(method, CSKD) for method in self.data.methods):
            raise ValueError('CSKD: these batches have a CSKD already: one is enough')
        self.data.methods.append(self)
        self._partners = None
        self._first = self._used = False

    def batches(self) -> Batches:
        """The loader's own batches; iterate over it once in every epoch."""
        return self.data

    def loss(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        """``F.cross_entropy(logits, target, **options)`` plus :meth:`term`."""
        return F.cross_entropy(logits, target, **options) + self.term(logits)

    def term(self, logits: Tensor) -> Tensor:
        """What CS-KD adds to a loss: ``weight * T^2 * KL(partner || anchor)``. Call it after the model.

        Args:
            logits: of the batch under way, ``[B, C]``.

        Raises:
            RuntimeError: outside ``batches()``.
        """
        if self._partners is None:
            raise RuntimeError('CSKD: the term is for training, in a loop over cskd.batches()')
        self._used = True
        if self.weight == 0:
            return logits.new_zeros(())
        model = unwrap(self.model)
        inputs = _to(self._inputs(self._partners), next(model.parameters()).device)
        with torch.no_grad():
            partner_logits = self._outputs(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))
        return self.weight * distillation_kl(logits, partner_logits, self.temperature)

    def state_dict(self) -> dict:
        """What a checkpoint must hold beside the model."""
        return {'batches': self.data.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.data.load_state_dict(state['batches'])

    # What Batches calls.

    def begin_epoch(self) -> None:
        self._first = True

    def begin_step(self, rows, partners) -> None:
        self._partners, self._used = partners, False

    def end_step(self) -> None:
        if self._first and not self._used:
            raise RuntimeError(
                'CSKD: a batch was trained on without cskd.loss(logits, target) or cskd.term(logits): add one of them'
            )
        self._first = False

    def end_epoch(self, finished: bool) -> None:
        self._partners = None


def _first(batch):
    if isinstance(batch, (list, tuple)):
        return batch[0]
    if isinstance(batch, Tensor):
        return batch
    raise ValueError(
        f'CSKD: which part of a {type(batch).__name__} goes to the model? '
        "Say it with inputs=, as lambda batch: batch['x']"
    )


def _to(inputs, device: torch.device):
    if isinstance(inputs, Mapping):
        return {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    return inputs.to(device, non_blocking=True)
