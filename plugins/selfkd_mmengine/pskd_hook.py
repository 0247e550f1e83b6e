"""PS-KD for any OpenMMLab toolkit: the growth of alpha, and the moments of the past. Toolkits subclass it."""

from typing import Any, Optional, Tuple

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import EarlyStoppingHook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn

from selfkd.losses import mix
from selfkd.options import check_options, choose_teacher, refuse_without_past, warn_without_effect
from selfkd.past import BankPast, Past, Prediction, copy_past
from selfkd.schedule import linear_growth, may_end_early
from selfkd.teacher import unwrap

from .hook import (
    SelfKDHook,
    checkpoint_folder,
    epoch_length,
    is_iter_based,
    is_sharded,
    loaded_folder,
    saves_after_this_iter,
    training_progress,
)

__all__ = ['PSKDHookBase', 'is_sigmoid', 'probs_of']


def is_sigmoid(loss: nn.Module) -> bool:
    """Whether a loss module of OpenMMLab has a sigmoid for each class, and not one softmax over all."""
    return bool(getattr(getattr(loss, 'ce', loss), 'use_sigmoid', False))  # LabelSmoothLoss has its loss inside


def probs_of(logits: Tensor, loss: nn.Module) -> Tensor:
    """What logits ``[B, C, ...]`` predict, by the loss module that they are trained with."""
    return logits.float().sigmoid() if is_sigmoid(loss) else logits.float().softmax(1)


class PSKDHookBase(SelfKDHook):
    """Progressive self-distillation from a past of any kind (``selfkd.past``).

    A subclass has the constructor, with its task's defaults. It shows the past the student's inputs
    (``before_forward``) and says what the loss becomes (``rewrite_loss``, with ``mix``).

    Args:
        alpha: final share of the past prediction in the target, in [0, 1]; grows linearly from 0.
        teacher: ``'bank'``, ``'snapshot'`` (the weights when the period began), ``'ema'`` (a moving average of the
            weights), or ``'auto'``: the bank, or the snapshot where there is an ``obstacle``.
        teacher_mode: of the copy, ``'train'``, as the network was when it trained (dropout, batch norm by the batch
            unless frozen), or ``'eval'``.
        interval: of the copy, in iteration-based loops: iterations between two refreshes of the snapshot; for ``'ema'``
            the length of the first period, in which there is no past. Defaults to one pass over the training set.
        ema_decay: of ``'ema'``: how much of the average stays in each step of the optimizer.
        keep_hard: the label's loss keeps its whole weight, 1 instead of ``1 - alpha``.
        options: the subclass's own; all of these become attributes.

    Attributes:
        source: the teacher taken, ``'bank'``, ``'snapshot'`` or ``'ema'``.
        past: what gives past predictions; None before the training.

    Raises:
        ValueError: settings out of range or of another teacher; and at the start of a training that ends before there
            is a past to learn from (of one epoch, or no longer than the first period), unless ``alpha`` is 0.
    """

    task = 'classification'
    no_bank: Optional[str] = None  # why predictions never belong to a single sample, if so
    averaged = ('pskd_hard', 'pskd_soft', 'pskd_entropy')
    teacher: str
    teacher_mode: str
    interval: Optional[int]
    ema_decay: float
    keep_hard: bool
    past: Past

    def __init__(self, alpha: float, **options: Any):
        super().__init__()
        self.alpha, self.options = alpha, options
        self.__dict__.update(options, past=None)
        check_options('PSKDHook', self.task, dict(alpha=alpha, **options))
        self.current_alpha = 0.0
        self.source: Optional[str] = None

    def obstacle(self, runner: Runner, model: nn.Module) -> Tuple[Optional[str], str]:
        """Why predictions belong to no single sample, so that they cannot be kept in a bank (None: they do), and what
        else than ``teacher='snapshot'`` is a way out, as ``', or remove batch_augments'``."""
        return self.no_bank, " or 'ema'"

    def make_bank(self, runner: Runner, model: nn.Module) -> BankPast:
        """The bank, where there is no obstacle."""
        raise NotImplementedError

    def rows_of(self, runner: Runner, batch_idx: int, data_batch) -> Tensor:
        """The bank's rows of a batch, int64 ``[B]``, on the CPU."""
        raise NotImplementedError

    def check(self, runner: Runner, model: nn.Module) -> None:
        if self.interval is not None and not is_iter_based(runner):
            raise ValueError(
                'PSKDHook: interval works in an iteration-based training loop only; an epoch-based loop takes the '
                'previous epoch. Remove interval'
            )
        obstacle, other_way = self.obstacle(runner, model) if self.teacher in ('auto', 'bank') else (None, '')
        if self.source is None:
            saved = (self._resumed_state or {}).get('source')
            if self.teacher == 'auto' and saved:
                self.source = saved  # what it was, whatever the resumed run would choose
                runner.logger.info(f"PSKDHook: teacher='auto' goes on with the {saved} of the checkpoint")
            else:
                self.source = choose_teacher(self.teacher, obstacle, log=runner.logger.info)
            if saved not in (None, self.source):
                raise ValueError(
                    f'PSKDHook: the checkpoint is of teacher={saved!r}, and this run of {self.source!r}: '
                    'resume with the same teacher, or load the weights without resuming'
                )
            warn_without_effect('PSKDHook', self.source, self.task, self.options, log=runner.logger.warning)
        if self.source == 'bank' and obstacle:
            raise ValueError(
                f"PSKDHook: {obstacle}, and teacher='bank' keeps a prediction per sample: set teacher='snapshot'"
                f'{other_way}'
            )
        if self.source != 'bank' and is_sharded(runner.model):
            raise ValueError(
                'PSKDHook: a past copy cannot be made of a model whose weights are sharded (FSDP): train with DDP, or '
                "set teacher='bank' where the plugin has it (MMPretrain)"
            )

    def setup(self, runner: Runner, model: nn.Module) -> None:
        self.period = self.interval if self.interval and self.source != 'bank' else epoch_length(runner)
        if self.alpha and is_iter_based(runner):
            way_out = f"raise max_iters, or set teacher='snapshot' with an interval below {runner.max_iters}"
            period_is = 'interval, or one pass over the training set'
            period = (self.period, runner.max_iters, 'iterations')
            refuse_without_past('PSKDHook', *period, period_is=period_is, way_out=way_out)
        elif self.alpha:
            period_is, way_out = 'the past is that of the epoch before', 'raise max_epochs'
            refuse_without_past('PSKDHook', 1, runner.max_epochs, 'epochs', period_is=period_is, way_out=way_out)
        if self.source == 'bank':
            self.past = bank = self.make_bank(runner, model)
            bank.side.place = (loaded_folder(runner), '')
        else:
            assert self.source is not None  # check has chosen it
            model.train()  # as the loop is about to do: norms that a model keeps frozen stay so in the copy
            self.past = copy_past(self.source, model, mode=self.teacher_mode, ema_decay=self.ema_decay)
        in_period = is_iter_based(runner) and runner.iter > self.period and runner.iter % self.period
        if runner.iter and self._resumed_state is None and (in_period or self.source != 'snapshot'):
            runner.logger.warning(
                f'PSKDHook: the checkpoint holds no past of teacher={self.source!r} (was it trained without this '
                'hook?): training is plain until there is one'
            )

    def before_train(self, runner: Runner) -> None:
        self.source = None
        super().before_train(runner)
        if self.alpha and any(isinstance(hook, EarlyStoppingHook) for hook in runner.hooks):
            runner.logger.warning(may_end_early('PSKDHook', self.alpha, 'all of training', ['EarlyStoppingHook']))

    def before_train_iter(self, runner: Runner, batch_idx, data_batch=None) -> None:
        super().before_train_iter(runner, batch_idx, data_batch)
        self.current_alpha = linear_growth(self.alpha, training_progress(runner, self.period))
        self.logs = {'pskd_alpha': torch.tensor(self.current_alpha)}
        if runner.iter > 0:
            model, optimizer = unwrap(runner.model), runner.optim_wrapper
            if isinstance(optimizer, OptimWrapperDict) or optimizer.should_update():  # in the iteration before
                self.past.after_update(model)
            if runner.iter % self.period == 0 if is_iter_based(runner) else batch_idx == 0:
                self.past.begin_period(model)
        rows = self.rows_of(runner, batch_idx, data_batch) if self.source == 'bank' else None
        self.past.begin_step(runner.iter, rows)

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        ends_pass = is_iter_based(runner) and self.every_n_train_iters(runner, self.period)
        if ends_pass or saves_after_this_iter(runner):
            self.past.synchronize()

    def after_train_epoch(self, runner: Runner) -> None:
        self.past.synchronize()

    def before_val_epoch(self, runner: Runner) -> None:
        if self.past is not None:  # the best checkpoint is saved after validation
            self.past.synchronize()

    def state_dict(self, runner: Runner, next_iter: int) -> dict:
        mid_period = is_iter_based(runner) and next_iter % self.period != 0
        if isinstance(self.past, BankPast):
            folder = checkpoint_folder(runner)
            beside = is_main_process() and '://' not in folder  # FSDPStrategy asks all ranks
            # By what is in the bank: within an epoch a hook of yours may save with mmengine's count of one step less.
            self.past.side.place = (folder, f'iteration {self.past.step + 1}') if beside else None
        return {'source': self.source, **self.past.state_dict(mid_period=mid_period)}

    def load_state_dict(self, state: dict) -> None:
        self.past.load_state_dict(state)

    # The loss.

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

    def entropy(self, past: Prediction, num_classes: int) -> Tensor:
        """The mean entropy of past predictions, in nats, for the log; of sigmoids, the sum over the classes."""
        if is_sigmoid(self.tapped):
            assert isinstance(past.probs, Tensor)  # a copy's
            past = past._replace(probs=torch.cat([past.probs, 1 - past.probs], 1))
        return past.entropy(num_classes)

    def mix(self, hard: Tensor, soft: Optional[Tensor] = None, prefix: str = '') -> Tensor:
        """``selfkd.losses.mix`` of two losses with the present alpha, or ``hard`` where there is no past.

        Both weighted parts are logged, summed over the calls of a step.
        """
        total = hard if soft is None else mix(hard, soft, self.current_alpha, keep_hard=self.keep_hard)
        of_past = torch.zeros(()) if soft is None else self.current_alpha * soft.detach()
        for name, part in (('hard', total.detach() - of_past), ('soft', of_past)):
            self.logs[f'{prefix}pskd_{name}'] = self.logs.get(f'{prefix}pskd_{name}', 0) + part
        return total
