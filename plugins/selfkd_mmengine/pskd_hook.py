"""PS-KD for any OpenMMLab toolkit: the growth of alpha and the snapshot teacher. Toolkits subclass it."""

from typing import Optional

import torch
from mmengine import dist
from mmengine.hooks import EarlyStoppingHook
from mmengine.runner import Runner
from torch import Tensor, nn

from selfkd.checks import one_of, share
from selfkd.schedule import linear_growth
from selfkd.teacher import MODES, SnapshotTeacher

from .hook import SelfKDHook, epoch_length, is_iter_based, is_sharded, training_progress, unwrap

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

    Raises:
        ValueError: settings out of range; and at the start of a training that ends before there is a past to learn from
            (of one epoch, or no longer than the first period), unless ``alpha`` is 0.
    """

    averaged = ('pskd_hard', 'pskd_soft', 'pskd_entropy')

    def __init__(self, alpha: float, snapshot: bool, interval: Optional[int] = None, teacher_mode: str = 'train'):
        super().__init__()
        share('PSKDHook', alpha=alpha)
        one_of('PSKDHook', MODES, teacher_mode=teacher_mode)
        if interval is not None and (type(interval) is not int or interval < 1):
            raise ValueError(f'PSKDHook: interval must be a positive number of iterations, got {interval}')
        self.alpha, self.snapshot, self.interval, self.teacher_mode = alpha, snapshot, interval, teacher_mode
        self.current_alpha = 0.0
        self.teacher: Optional[SnapshotTeacher] = None
        self.teacher_ready = False

    def check(self, runner: Runner, model: nn.Module) -> None:
        if self.interval is not None and not (self.snapshot and is_iter_based(runner)):
            raise ValueError(
                'PSKDHook: interval works with a snapshot teacher in an iteration-based training loop only; an '
                'epoch-based loop takes the previous epoch. Remove interval'
            )
        if self.snapshot and is_sharded(runner.model):
            raise ValueError(
                'PSKDHook: a past copy cannot be made of a model whose weights are sharded (FSDP): train with DDP, or '
                "set teacher='bank' where the plugin has it (MMPretrain)"
            )

    def setup(self, runner: Runner, model: nn.Module) -> None:
        self.period = self.interval or epoch_length(runner)
        self._refuse_if_there_will_be_no_past(runner)
        if self.snapshot:
            self.teacher, self.teacher_ready = SnapshotTeacher(model, mode=self.teacher_mode), False

    def _refuse_if_there_will_be_no_past(self, runner: Runner) -> None:
        if self.alpha == 0:
            return
        if not is_iter_based(runner):
            if runner.max_epochs < 2:
                raise ValueError(
                    'PSKDHook: it learns from the epoch before, and training has one epoch: it would be plain. '
                    'Train for two epochs or more (max_epochs), or set alpha=0 if plain is what you want'
                )
        elif self.period >= runner.max_iters:
            what = 'interval' if self.interval else 'one pass over the training set'
            way_out = f'Set interval below {runner.max_iters}, or raise max_iters'
            if not self.snapshot:
                way_out = "Raise max_iters, or set teacher='snapshot' with an interval below it"
            raise ValueError(
                f'PSKDHook: it learns from the period before, the first period is {self.period} iterations long '
                f'({what}), and training ends after {runner.max_iters}: it would be plain. {way_out}; '
                'or set alpha=0 if plain is what you want'
            )

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        if self.alpha and any(isinstance(hook, EarlyStoppingHook) for hook in runner.hooks):
            runner.logger.warning(
                'PSKDHook: alpha grows until the last epoch (max_epochs or max_iters), so where EarlyStoppingHook ends '
                f'training earlier it does not reach {self.alpha}: compare runs of one length, or set max_epochs to '
                'the length that you expect'
            )

    def check_cross_entropy(self, loss: Tensor, expected: Tensor) -> None:
        """Refuses a loss module that does not give the cross-entropy of its logits, which the past's term belongs to.

        Args:
            loss: the module's own value.
            expected: the cross-entropy, with the module's class weights, smoothing, weight and reduction.
        """
        loss, expected, precision = loss.detach().float(), expected.detach().float(), torch.finfo(loss.dtype).eps
        if self.alpha == 0 or not bool(loss.isfinite().all()):
            return
        same = loss.shape == expected.shape and torch.allclose(
            loss, expected, rtol=max(1e-4, 16 * precision), atol=1e-6
        )
        if not same:
            raise RuntimeError(
                f'PSKDHook: {type(self.tapped).__name__} gives {loss.mean():.6g} where the cross-entropy of its logits '
                f'is {expected.mean():.6g} (class_weight, loss_weight, smoothing and reduction of the module '
                'considered): (1 - alpha) of the one and alpha of the other are no one target. Use a cross-entropy '
                "(the toolkit's CrossEntropyLoss, MMPretrain's LabelSmoothLoss), or train without this hook"
            )

    def before_train_iter(self, runner: Runner, batch_idx, data_batch=None) -> None:
        super().before_train_iter(runner, batch_idx, data_batch)
        self.current_alpha = linear_growth(self.alpha, training_progress(runner, self.period))
        self.logs = {'pskd_alpha': torch.tensor(self.current_alpha)}
        starts_period = runner.iter % self.period == 0 if is_iter_based(runner) else batch_idx == 0
        if self.snapshot and starts_period and runner.iter > 0:
            self.teacher.update(unwrap(runner.model))
            # Batch norm's running statistics differ between ranks: in evaluation mode all learn from rank 0's, which
            # are those of a checkpoint.
            for buffer in self.teacher.model.buffers():
                dist.broadcast(buffer)
            self.teacher_ready = True
        if self.snapshot:
            self.teacher.begin_step(runner.iter)

    def mix(self, hard: Tensor, soft: Optional[Tensor] = None, prefix: str = '', *, keep_hard: bool = False) -> Tensor:
        """(1 - alpha) hard + alpha soft (cross-entropy is linear in its target), or ``hard`` where there is no past.

        Both parts are logged, summed over the calls of a step.

        Args:
            keep_hard: ``hard`` keeps its whole weight: where the loss is not linear in its target, and in detectors.
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
