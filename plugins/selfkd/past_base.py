"""What all sources of past predictions have in common: the moments of a training, and what they predict."""

from typing import Any, Callable, Dict, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from .topk import TopK
from .transfer import to_device

__all__ = ['Past', 'Prediction', 'check_kind']


class Prediction(NamedTuple):
    """Past predictions of a batch.

    Attributes:
        probs: ``[N, C, ...]``, or [`TopK`][selfkd.topk.TopK]; a constant.
        known: which have one, bool ``[N]``; True: all. Of samples on the CPU, of tokens on the device of their labels.
    """

    probs: Union[Tensor, TopK]
    known: Union[Tensor, bool]

    def to(self, device: torch.device) -> 'Prediction':
        """With ``probs`` on another device; ``known`` stays where it is."""
        if isinstance(self.probs, TopK):
            return self._replace(probs=TopK(*(to_device(part, device) for part in self.probs)))
        return self._replace(probs=to_device(self.probs, device))

    @property
    def all_known(self) -> bool:
        """Whether all are known to be known, without a look at an accelerator."""
        if isinstance(self.known, bool):
            return self.known
        return self.known.device.type == 'cpu' and bool(self.known.all())

    def alpha(self, alpha: float) -> Union[Tensor, float]:
        """The share of the past for each sample: 0 for those that have none. A number, where all have one."""
        return alpha if self.all_known else alpha * self.known

    def entropy(self, num_classes: int, counted: Optional[Tensor] = None) -> Tensor:
        """Mean entropy of those that are known, in nats, a scalar on the device of ``probs``: for logs.

        ``counted``: bool ``[N, ...]``, False at positions that have no label.
        """
        if isinstance(self.probs, TopK):
            kept, rest = torch.special.entr(self.probs.values).sum(1), torch.special.entr(self.probs.rest(num_classes))
            values = kept + (num_classes - self.probs.values.shape[1]) * rest
        else:  # a few samples at a time: a vocabulary is large
            values = torch.cat([torch.special.entr(part).sum(1) for part in self.probs.split(256)])
        known = torch.ones_like(values) if counted is None else counted.to(values)
        if not self.all_known:
            of_samples = to_device(torch.as_tensor(self.known), values.device)
            known = known * of_samples.view(-1, *[1] * (values.dim() - 1))
        return (values * known).sum() / known.sum().clamp(min=1)


class Past:
    """What the sources of the past have in common: by default they do nothing at each of these moments.

    In the order of a training: ``load_state_dict`` (resumed), then for each period ``begin_period``, for each
    step ``begin_step``, ``begin_forward`` before the student's forward pass, and at the loss ``predict``
    and then ``observe``. ``ready`` says whether there is a past to learn from.
    """

    ready = False

    def begin_period(self, model: nn.Module) -> None:
        """At the start of each period but the first, in all processes. ``model`` is the student, unwrapped."""

    def begin_step(self, step: int, rows: Optional[Tensor] = None) -> None:
        """Before a training step. ``rows``: the batch's samples, int64 ``[B]`` on the CPU; only banks need them."""

    def after_update(self, model: nn.Module) -> None:
        """The student's weights have moved: after a step of the optimizer, in all processes."""

    def begin_forward(self, forward: Callable[[nn.Module], Tensor]) -> None:
        """Before the student's forward pass; ``forward(model)`` gives the probs of the same inputs, ``[N, C, ...]``."""

    def predict(self, target: Tensor) -> Optional[Prediction]:
        """Past predictions of the batch under way, or None: of no sample there is one."""
        raise NotImplementedError

    def observe(self, logits: Tensor) -> None:
        """Is shown what the student predicts for that batch in training."""

    def synchronize(self) -> None:
        """Called by all processes together at the end of an epoch, and before one of them saves a checkpoint."""

    def state_dict(self, mid_period: bool = True) -> Dict[str, Any]:
        """What a resumed run could not work out again, loadable with ``weights_only=True``.

        ``mid_period``: training goes on within a period. Else the next one is about to begin, with
        ``begin_period``, so that a snapshot would be the saved weights themselves.
        """
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restores ``state_dict``; ``{}`` where a checkpoint has nothing.

        Raises:
            ValueError: the state is another source's, or a bank's with other settings.
        """


def check_kind(state: Dict[str, Any], ours: str) -> None:
    """Refuses the state of another source of the past than the one that keeps its own under the key ``ours``."""
    kinds = {'bank': 'bank', 'teacher': 'snapshot', 'average': 'ema'}
    saved = next((kind for kind in kinds if kind in state), ours)
    if saved != ours:
        raise ValueError(
            f"PS-KD: the checkpoint's past is of teacher={kinds[saved]!r}, and this run's of teacher={kinds[ours]!r}: "
            'resume with the same teacher, or load the weights without resuming'
        )
