"""PS-KD for any OpenMMLab toolkit: the growth of alpha and the snapshot teacher. Toolkits subclass it."""

from typing import Optional

import torch
from mmengine import dist
from mmengine.runner import Runner
from torch import Tensor, nn

from selfkd.schedule import linear_growth
from selfkd.checks import one_of, share
from selfkd.teacher import MODES, SnapshotTeacher

from .hook import SelfKDHook, epoch_length, is_iter_based, training_progress, unwrap

__all__ = ['PSKDHookBase']


class PSKDHookBase(SelfKDHook):
    """Progressive self-distillation from a past copy of the model.

    Args:
        alpha: final share of the past prediction in the target, in [0, 1]; grows linearly from 0.
        snapshot: keep a past copy of the model in ``self.teacher``.
        interval: iterations between two refreshes of the copy, in iteration-based loops (default: one pass over the
            data). Epoch-based loops refresh it at the start of every epoch.
        teacher_mode: of the copy, ``'train'`` (as the network was when it trained) or ``'eval'``; see
            :class:`selfkd.teacher.SnapshotTeacher`.
    """

    def __init__(self, alpha: float, snapshot: bool, interval: Optional[int] = None, teacher_mode: str = 'train'):
        super().__init__()
        share('PSKDHook', alpha=alpha)
        one_of('PSKDHook', MODES, teacher_mode=teacher_mode)
        if interval is not None and interval < 1:
            raise ValueError(f'PSKDHook: interval must be a positive number of iterations, got {interval}')
        self.alpha, self.snapshot, self.interval, self.teacher_mode = alpha, snapshot, interval, teacher_mode
        self.current_alpha = 0.0
        self.teacher: Optional[SnapshotTeacher] = None
        self.teacher_ready = False

    def check(self, runner: Runner, model: nn.Module) -> None:
        if self.interval is not None and not (self.snapshot and is_iter_based(runner)):
            raise ValueError(
                'PSKDHook: interval works with a snapshot teacher in an iteration-based training loop only; an '
                'epoch-based '
                'loop takes the previous epoch. Remove interval'
            )

    def setup(self, runner: Runner, model: nn.Module) -> None:
        self.period = self.interval or epoch_length(runner)
        if self.snapshot:
            self.teacher, self.teacher_ready = SnapshotTeacher(model, mode=self.teacher_mode), False

    def before_train_iter(self, runner: Runner, batch_idx, data_batch=None) -> None:
        self.current_alpha = linear_growth(self.alpha, training_progress(runner, self.period))
        self.logs = {'pskd_alpha': torch.tensor(self.current_alpha)}
        starts_period = runner.iter % self.period == 0 if is_iter_based(runner) else batch_idx == 0
        if self.snapshot and starts_period and runner.iter > 0:
            self.teacher.update(unwrap(runner.model))
            # Batch-norm statistics differ between ranks: all ranks learn from rank 0's.
            for buffer in self.teacher.model.buffers():
                dist.broadcast(buffer)
            self.teacher_ready = True
        if self.snapshot:
            self.teacher.begin_step(runner.iter)

    def mix(self, hard: Tensor, soft: Optional[Tensor] = None, prefix: str = '', *, keep_hard: bool = False) -> Tensor:
        """(1 - alpha) hard + alpha soft (cross-entropy is linear in its target), or ``hard`` where there is no past.

        Both parts are logged, summed over the calls of a step.

        Args:
            keep_hard: ``hard`` keeps its whole weight, for losses that are not linear in their target.
        """
        if soft is not None:
            hard = hard if keep_hard else (1 - self.current_alpha) * hard
            soft = self.current_alpha * soft
        for name, part in (('hard', hard), ('soft', soft)):
            past = self.logs.get(f'{prefix}pskd_{name}', torch.zeros(()))
            self.logs[f'{prefix}pskd_{name}'] = past if part is None else past + part.detach()
        return hard if soft is None else hard + soft

    def state_dict(self, runner: Runner, next_iter: int) -> dict:
        # At the start of a period the teacher is about to become the saved weights themselves.
        if not self.teacher_ready or not is_iter_based(runner) or next_iter % self.period == 0:
            return {}
        return {'teacher': {name: value.cpu() for name, value in self.teacher.state_dict().items()}}

    def load_state_dict(self, state: dict) -> None:
        if self.snapshot and 'teacher' in state:
            self.teacher.load_state_dict(state['teacher'])
            self.teacher_ready = True
