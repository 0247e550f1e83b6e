"""CS-KD in a training loop of your own."""

import inspect
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from selfkd.checks import at_least_zero, positive
from selfkd.losses import distillation_kl
from selfkd.pairing import SameClassPairing
from selfkd.teacher import random_state, unwrap
from selfkd.transfer import to_device

from .batches import Method
from .calls import Hook, copied
from .tap import add_terms

__all__ = ['CSKD']

WAY_OUT = 'give the class ids that the loss sees as labels=, and leave out Mixup and CutMix, which have other partners'


class CSKD(Method):
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
        inputs: gives the model's input from a batch, where that is not the batch's first entry as it is. What the loop
            does with a batch before the model (normalisation, augmentation on the accelerator) belongs in here, since
            it must be done with the partners as well: ``inputs=lambda batch: normalize(batch[0].cuda())``. The first
            batch of each epoch shows whether it is: the model must be called with what this gives.
        outputs: gives the logits from what the model returns, where that is not they.
        seed: of the partners.

    ``logs`` of the latest loss, a tensor ``[]``: ``loss_cskd``, the term with its weight.

    Raises:
        ValueError: for data whose classes are not known, settings out of range, samples in other places of the batch
            than their rows, and inputs that the partners would not get.

    Example:
        >>> images, labels, model = torch.randn(8, 4), torch.arange(8) % 2, nn.Linear(4, 2)
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
        >>> cskd = CSKD(loader, model, labels=labels)
        >>> for x, y in cskd.batches():
        ...     loss = cskd.loss(model(x), y)
    """

    name, call = 'CSKD', 'cskd.loss(logits, target) or cskd.term(logits, target)'
    way_in = 'add one of them, or put cskd.tap() around code that cannot be edited'

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
        super().__init__(loader)
        dataset: Any = getattr(self.data.loader, 'dataset', None)
        labels = getattr(dataset, 'targets', None) if labels is None else labels
        if labels is None or (hasattr(dataset, '__len__') and len(labels) != len(dataset)):
            raise ValueError(
                f'CSKD: partners are of one class, but {type(dataset).__name__} has no attribute targets with a class '
                f'for each of its samples: give them as labels=, got {None if labels is None else len(labels)}'
            )
        self._labels = torch.as_tensor(labels, device='cpu')
        self.data.pair('CSKD', SameClassPairing(labels), seed)
        self.data.methods.append(self)
        self._rows: Any = None
        self._partner_rows: Any = None
        self._partners: Any = None
        self._labels_at: Any = None  # the entry of a batch that is the labels, once it is known
        self._check: Optional[_SameInputs] = None  # in the first batch of an epoch
        self._checked = False
        self.logs: Dict[str, Tensor] = {}

    def loss(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        """``F.cross_entropy(logits, target, **options)`` plus ``term``."""
        return F.cross_entropy(logits, target, **options) + self.term(logits, target)

    def term(self, logits: Tensor, target: Optional[Tensor] = None) -> Tensor:
        """What CS-KD adds to a loss: ``weight * T^2 * KL(partner || anchor)``. Call it after the model.

        Args:
            logits: of the batch under way, ``[B, C]``.
            target: class ids ``[B]``, or probs ``[B, C]`` of one class each (smoothed), to be compared with those of
                the samples drawn.

        Raises:
            RuntimeError: outside ``batches()``.
            ValueError: the samples of the batch are not those drawn, or partners would not get the model's inputs.
        """
        if self._partners is None:
            raise RuntimeError('CSKD: the term is for training, in a loop over cskd.batches()')
        self.used += 1
        if self.weight == 0:
            return self._logged(logits.new_zeros(()))
        if target is not None:
            self._pairing.check_labels(self._rows, _class_ids(target), way_out=WAY_OUT)
        if self._check is not None:
            self._check.refuse_if_other()
            self._end_check()
            self._checked = True
        model = unwrap(self.model)
        inputs = _to(self._inputs(self._partners), next(model.parameters()).device)
        with torch.no_grad():
            partner_logits = self._outputs(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))
        return self._logged(self.weight * distillation_kl(logits, partner_logits, self.temperature))

    tap = add_terms

    def _logged(self, term: Tensor) -> Tensor:
        self.logs = {'loss_cskd': term.detach()}
        return term

    def state_dict(self) -> dict:
        """What a checkpoint must hold beside the model."""
        return {'batches': self.data.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.data.load_state_dict(state['batches'])

    # What Batches calls.

    def begin_epoch(self) -> bool:
        new = super().begin_epoch()
        self._checked = self._checked and not new
        return new

    def begin_step(self, rows, partners, batch) -> None:
        super().begin_step(rows, partners, batch)
        self._rows, (self._partner_rows, self._partners) = rows, partners
        if self.weight == 0 or batch is None:
            return
        self._compare_labels(batch)
        self._end_check()
        if not self._checked:
            self._check = _SameInputs(self.model, self._inputs, batch)

    def _compare_labels(self, batch) -> None:
        """The labels of samples and partners, where the batch holds them."""
        drawn = self._labels[self._rows]
        if self._labels_at is None and len(drawn.unique()) > 1:
            for name, entry in _entries(batch):
                found = entry.cpu().long().sort().values  # in whatever order
                if entry.shape == drawn.shape and torch.equal(found, drawn.long().sort().values):
                    self._labels_at = name
        for rows, entries in ((self._rows, _entries(batch)), (self._partner_rows, _entries(self._partners))):
            labels = dict(entries).get(self._labels_at)
            if labels is not None:
                self._pairing.check_labels(rows, labels, way_out=WAY_OUT)

    @property
    def _pairing(self) -> SameClassPairing:
        assert self.data.pairing is not None  # the constructor has asked for partners
        return self.data.pairing

    def _end_check(self) -> None:
        if self._check is not None:
            self._check.leave()
            self._check = None

    def end_step(self) -> None:
        super().end_step()
        self._end_check()

    def end_epoch(self, finished: bool) -> None:
        self._end_check()
        self._partners = None
        super().end_epoch(finished)


class _SameInputs:
    """Notes what the model is called with for a batch, to be compared with what partners would get."""

    def __init__(self, model: nn.Module, inputs: Callable, batch):
        self._kind = type(unwrap(model)).__name__
        # Of copies: neither what the loop nor what inputs= does with the batch in place changes the other.
        with random_state(0, next(model.parameters()).device):  # a look must not change what is drawn later
            self._expected, again = (inputs(tree_map(copied, batch)) for _ in range(2))
        self._random = not _alike(self._expected, again)
        self._calls: List[Tuple[tuple, dict]] = []
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._names = list(inspect.signature(inner.forward).parameters)
        self._hook = inner.register_forward_pre_hook(Hook(self._note), with_kwargs=True)

    def _note(self, module: nn.Module, args, kwargs) -> None:
        self._calls.append(tree_map(copied, (args, kwargs)))

    def leave(self) -> None:
        self._hook.remove()

    def refuse_if_other(self) -> None:
        if not self._calls:
            raise RuntimeError(
                f'CSKD: the {self._kind} given as model= was not called before the loss: give the module that the loop '
                'calls, and call it first'
            )
        expected, seen = self._expected, None
        for args, kwargs in self._calls:
            named = dict(zip(self._names, args), **kwargs)
            seen = named if isinstance(expected, Mapping) else next(iter((*args, *kwargs.values())), None)
            if _alike(expected, seen, self._random):
                return
        raise ValueError(
            f'CSKD: the {self._kind} was called with {_described(seen)}, but partners would come as '
            f'{_described(expected)}: what the loop does with a batch before the model must be done with the partners '
            'as well: give it as inputs=, as in inputs=lambda batch: normalize(batch[0])'
        )


def _alike(expected, seen, only_shapes: bool = False) -> bool:
    if isinstance(expected, Mapping):
        return isinstance(seen, Mapping) and all(
            name in seen and _alike(value, seen[name], only_shapes) for name, value in expected.items()
        )
    if not isinstance(expected, Tensor):
        return True
    if not isinstance(seen, Tensor) or expected.shape != seen.shape:
        return False
    expected = expected.to(seen.device)
    return only_shapes or torch.allclose(expected.double(), seen.double(), rtol=1e-2, atol=1e-3, equal_nan=True)


def _described(inputs) -> str:
    if isinstance(inputs, Mapping):
        return '{' + ', '.join(f'{name}: {_described(value)}' for name, value in inputs.items()) + '}'
    if isinstance(inputs, Tensor):
        return f'{tuple(inputs.shape)} of mean {inputs.double().mean().item():.4g}'
    return type(inputs).__name__


def _entries(batch) -> List[Tuple[object, Tensor]]:
    """The entries of a batch that may be class ids."""
    named = (
        batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, (list, tuple)) else ()
    )
    return [
        (name, entry)
        for name, entry in named
        if isinstance(entry, Tensor) and entry.dim() == 1 and not entry.is_floating_point() and not entry.is_complex()
    ]


def _class_ids(target: Tensor) -> Tensor:
    """Of probs the class that is above all others, which are alike; -1, the id of no class, where they are mixed."""
    if not target.is_floating_point():
        return target
    best, least = target.topk(2, 1), target.amin(1)
    smoothed = best.values[:, 1] - least < 1e-4
    if target.shape[1] == 2:  # the other class is always the least: smoothing gives it little, and in all samples alike
        smoothed = (least - least.amin() < 1e-4) & (least <= 0.1)
    return torch.where(smoothed, best.indices[:, 0], -1)


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
        return {name: to_device(value, device) for name, value in inputs.items()}
    return to_device(inputs, device)
