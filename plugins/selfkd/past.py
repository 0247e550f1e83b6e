"""Where PS-KD's past predictions come from: a bank of predictions or tokens, a snapshot or an average of the weights.

A plugin makes one of them, calls its moments, and says where rows, inputs, periods and the loss are. A period is an
epoch, or an interval of iterations. In the first one there is no past, whatever its source.

The banks are in ``selfkd.past_bank``, and what all sources have in common in ``selfkd.past_base``.
"""

from typing import Any, Callable, Dict, Optional

import torch.distributed as dist
from torch import Tensor, nn

from .past_bank import BankPast, TokenBankPast
from .past_base import Past, Prediction, check_kind
from .teacher import HALF, SnapshotTeacher

__all__ = ['AveragePast', 'BankPast', 'CopyPast', 'Past', 'Prediction', 'SnapshotPast', 'TokenBankPast']
__all__ += ['check_kind', 'copy_past']


class CopyPast(Past):
    """A past that is a frozen copy of the model, asked about the student's own inputs.

    Make it before torch hooks are registered on the model, which would be copied, too.

    Attributes:
        teacher: the copy, with a random state of its own.
    """

    def __init__(self, model: nn.Module, *, mode: str = 'train'):
        self.teacher = SnapshotTeacher(model, mode=mode)
        self._probs: Optional[Tensor] = None

    def run(self, function: Callable, *args, **kwargs):
        """Calls a function of the copy (``past.model.extract_feat``) without gradients, with its own noise."""
        return self.teacher.run(function, *args, **kwargs)

    @property
    def model(self) -> nn.Module:
        return self.teacher.model

    def begin_step(self, step: int, rows: Optional[Tensor] = None) -> None:
        self._probs = None
        self.teacher.begin_step(step)

    def begin_forward(self, forward: Callable[[nn.Module], Tensor]) -> None:
        if self.ready:
            self._probs = self.run(forward, self.model)

    def predict(self, target: Tensor) -> Optional[Prediction]:
        if not self.ready:
            return None
        if self._probs is None:
            raise RuntimeError('PS-KD: a loss was computed without a forward pass that the past copy could follow')
        return Prediction(self._probs, True)

    def _share_buffers(self) -> None:
        """Batch norms' statistics differ between processes: all learn from the first one's, a checkpoint's."""
        if dist.is_available() and dist.is_initialized():
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    dist.broadcast(buffer, 0)


class SnapshotPast(CopyPast):
    """The weights as they were when the present period began."""

    def begin_period(self, model: nn.Module) -> None:
        self.teacher.update(model)
        self._share_buffers()
        self.ready = True

    def state_dict(self, mid_period: bool = True) -> Dict[str, Any]:
        return {'teacher': _saved(self.model)} if self.ready and mid_period else {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        check_kind(state, 'teacher')
        if 'teacher' in state:
            self.teacher.load_state_dict(state['teacher'])
            self.ready = True


class AveragePast(CopyPast):
    """An exponential moving average of the weights, which changes with each step of the optimizer.

    Args:
        decay: of the average, in [0, 1). It begins lower, at ``(1 + t) / (10 + t)`` after t steps, so that the initial
            weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999, mode: str = 'train'):
        if not 0 <= decay < 1:
            raise ValueError(f'ema_decay: must lie in [0, 1), got {decay}')
        super().__init__(model, mode=mode)
        self.decay, self.updates = decay, 0

    def after_update(self, model: nn.Module) -> None:
        self.updates += 1
        self.teacher.average(model, min(self.decay, (1 + self.updates) / (10 + self.updates)))
        if self.teacher.mode == 'eval':
            self._share_buffers()

    def begin_period(self, model: nn.Module) -> None:
        self.ready = True

    def state_dict(self, mid_period: bool = True) -> Dict[str, Any]:
        wide = [
            average.cpu().clone() for average, p in zip(self.teacher.wide, self.model.parameters()) if average is not p
        ]
        return {'average': _saved(self.model), 'wide': wide, 'updates': self.updates, 'ready': self.ready}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        check_kind(state, 'average')
        if 'average' in state:
            self.teacher.load_state_dict(state['average'])
            self.updates, self.ready = state['updates'], state['ready']
            if state['wide']:
                wide = iter(state['wide'])
                self.teacher.wide = [next(wide).to(p.device) if p.dtype in HALF else p for p in self.model.parameters()]


def copy_past(teacher: str, model: nn.Module, *, mode: str, ema_decay: float) -> CopyPast:
    """The copy that ``teacher='snapshot'`` or ``'ema'`` asks for."""
    if teacher == 'ema':
        return AveragePast(model, decay=ema_decay, mode=mode)
    return SnapshotPast(model, mode=mode)


def _saved(model: nn.Module) -> Dict[str, Tensor]:
    copies: Dict[Any, Tensor] = {}  # tied weights are saved once
    return {
        name: copies.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().cpu().clone())
        for name, tensor in model.state_dict().items()
    }
