"""PS-KD in a training loop of your own."""

import logging
from typing import Any, Callable, Dict, Optional, Union
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.bank import PredictionBank
from selfkd.checks import is_compiling, outside_graphs
from selfkd.losses import pskd_cross_entropy
from selfkd.options import check_options, choose_teacher, warn_without_effect
from selfkd.past import BankPast, Past, Prediction, copy_past
from selfkd.renamed import renamed
from selfkd.schedule import linear_growth
from selfkd.teacher import unwrap
from selfkd.transfer import to_device

from .batches import Method
from .calls import Calls
from .settings import steps_of
from .tap import heard, tap, unheard

__all__ = ['PSKD']

logger = logging.getLogger(__name__)

WAY_OUT = "use teacher='snapshot' with model=, which needs no rows"


class PSKD(Method):
    """Progressive self-knowledge distillation: three lines in a loop that stays as it is.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    Args:
        loader: the DataLoader of the training set, or another method's ``batches()``.
        num_classes: C; for the bank. By default it is seen at the first loss.
        max_epochs: how many epochs the whole training takes, an epoch being a loop over ``batches()``.
        max_steps: in its place how many batches it takes, for a loop that counts these; an epoch is then one pass over
            the data, counted by samples.
        alpha: final share of the past prediction in the target, in [0, 1]; it grows linearly, by epochs.
        teacher: where the past comes from. ``'bank'`` keeps what was predicted for each sample when it was last trained
            on (the paper's way, no extra forward pass); ``'snapshot'`` runs the model of the end of the last epoch on
            the present inputs, ``'ema'`` an average of the weights. ``'auto'``: the bank, or, given ``model``, the
            snapshot where samples have no index or the first loss is not one of a label for each; the log says why.
        teacher_mode: how a copy runs, see [`selfkd.teacher.SnapshotTeacher`][].
        interval: a period is so many batches, in place of an epoch, for copies and long epochs; alpha then grows with
            the share of training that was done when the period began.
        ema_decay: of ``'ema'``, by batches.
        keep_hard: the label's term keeps its whole weight, 1 instead of ``1 - alpha``.
        top_k, bank_dtype, bank_device, bank_momentum: of the bank, see [`selfkd.bank.PredictionBank`][] and
            [`selfkd.past.BankPast`][]; a dtype also by its name. The device is by default the logits'.
        model: for a copy: the module that the loop calls (DistributedDataParallel, torch.compile'd or plain).
        outputs: for a copy: gives the logits from what the model returns, where that is not they; of a model with
            several outputs a tuple, each with a past of its own.

    ``logs`` of the latest loss, numbers or tensors ``[]``: ``pskd_alpha``, ``pskd_hard`` and ``pskd_soft`` (sum to it),
    ``pskd_entropy`` (of the past, in nats), ``pskd_skipped`` (predictions that were not finite).

    Raises:
        ValueError: for settings that cannot work or would never act; each message says what to change.

    Example:
        >>> images, labels, model = torch.randn(8, 4), torch.arange(8) % 2, nn.Linear(4, 2)
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> pskd = PSKD(loader, max_epochs=3)
        >>> for epoch in range(3):
        ...     for x, y in pskd.batches():
        ...         loss = pskd.loss(model(x), y)
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> round(pskd.current_alpha, 1)
        0.3
    """

    name, task, call = 'PSKD', 'classification', 'pskd.loss(logits, target)'
    way_in = 'use it in place of the cross-entropy, or pskd.tap() around code that cannot be edited'

    @renamed(dtype='bank_dtype', device='bank_device')
    def __init__(
        self,
        loader,
        num_classes: Optional[int] = None,
        *,
        max_epochs: Optional[int] = None,
        max_steps: Optional[int] = None,
        alpha: float = 0.3,
        teacher: str = 'auto',
        teacher_mode: str = 'train',
        interval: Optional[int] = None,
        ema_decay: float = 0.999,
        keep_hard: bool = False,
        top_k: Optional[int] = None,
        bank_dtype: Union[str, torch.dtype, None] = 'float32',
        bank_device: Union[str, torch.device, None] = None,
        bank_momentum: float = 0.0,
        model: Optional[nn.Module] = None,
        outputs: Optional[Callable] = None,
    ):
        self._settings: Dict[str, Any] = dict(teacher_mode=teacher_mode, interval=interval)
        self._settings.update(ema_decay=ema_decay, top_k=top_k)
        self._settings.update(bank_dtype=bank_dtype, bank_device=bank_device, bank_momentum=bank_momentum)
        given = dict(alpha=alpha, teacher=teacher, **self._settings, model=model, outputs=outputs)
        check_options('PSKD', self.task, given)
        super().__init__(loader)
        self.num_classes, self.max_epochs = num_classes, max_epochs
        self.alpha, self.interval, self.keep_hard = alpha, interval, keep_hard
        self.model: Any = model  # None: there is no copy
        self.max_steps = steps_of(self.data, alpha, interval, max_epochs, max_steps)
        model_name = type(None if model is None else unwrap(model)).__name__
        self._calls = Calls(outputs, model_name)
        self.kind = 'auto'  # of the past, until it is known
        self.past = Past()  # does nothing; a bank is made at the first loss
        self._saved: Dict[str, Any] = {}  # of a bank that is not made yet
        # Loss modules of tap() that have shown that they are.
        self.cross_entropies: WeakSet[nn.Module] = WeakSet()
        self._looks = False  # at the order of samples, in an epoch's first batch
        self.sees_log_probs = False  # whether F.nll_loss has shown that it gets them
        self._begin_with(teacher)
        self.data.methods.append(self)
        self.count, self._progress = 0, 0.0  # losses that a past belongs to; the share of training that alpha goes by
        self.logs: Dict[str, Union[float, Tensor]] = {}
        self._rows: Optional[Tensor] = None
        self._inside = False

    def _begin_with(self, teacher: str) -> None:
        """What is known of the past before the first loss."""
        obstacle = 'interval= refreshes a copy of the model' if self.interval else self.data.why_not_numbered()
        if obstacle and (self.interval or self.model is not None):
            teacher = choose_teacher(teacher, obstacle)
        if teacher in ('auto', 'bank'):
            self.data.number('PSKD', WAY_OUT)
        self._take(teacher)

    def _take(self, teacher: str) -> None:
        """The past is of this kind, whatever ``teacher`` was."""
        self.kind = teacher
        if teacher in ('snapshot', 'ema'):
            if self.model is None:
                raise ValueError(f'PSKD: teacher={teacher!r} copies the model: give it as model=')
            mode, decay = self._settings['teacher_mode'], self._settings['ema_decay']
            self.past = self._calls.past = copy_past(teacher, unwrap(self.model), mode=mode, ema_decay=decay)
        if teacher != 'auto':
            warn_without_effect('PSKD', teacher, self.task, self._settings)

    @property
    def bank(self) -> Optional[PredictionBank]:
        return getattr(self.past, 'bank', None)

    def _make_bank(self, num_classes: int, device: torch.device) -> BankPast:
        options, rows = self._settings, len(self.data.loader.dataset)
        stored = dict(top_k=options['top_k'], dtype=options['bank_dtype'] or 'float32')
        bank = PredictionBank(rows, num_classes, device=options['bank_device'] or device, **stored)
        return BankPast(bank, momentum=options['bank_momentum'], way_out=WAY_OUT)

    @property
    def current_alpha(self) -> float:
        """The share in the epoch under way."""
        return linear_growth(self.alpha, self._progress)

    def loss(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        """In place of ``F.cross_entropy(logits, target, **options)``, and with its options.

        Args:
            logits: ``[B, C]`` of the batch under way; with a copy also ``[B, C, ...]``.
            target: class ids ``[B, ...]``; with a copy also probs ``[B, C, ...]`` (mixed labels).
            options: ``weight``, ``ignore_index``, ``reduction``, ``label_smoothing`` as in torch's.

        Raises:
            RuntimeError: outside ``batches()``, or (bank) for the second time in a batch.
            ValueError: logits that are not those of the batch.
        """
        past, alpha = self._look_up(logits, target, is_compiling())
        if is_compiling():
            return self._mixed(logits, target, past, alpha, options)
        with unheard():
            return self._mixed(logits, target, past, alpha, options)

    @outside_graphs
    def _look_up(self, logits: Tensor, target: Tensor, compiled: bool):
        """The past, and the share that each sample learns of it: in compiled code always a tensor, since a number that
        grows would have the code compiled again."""
        past = self.past_of(logits, target)
        if past is None:
            return None, 0.0
        alpha = past.alpha(self.current_alpha)
        if compiled:
            alpha = self.current_alpha * to_device(torch.as_tensor(past.known), logits.device)
        return past, alpha

    def _mixed(
        self, logits: Tensor, target: Tensor, past: Optional[Prediction], alpha, options: Dict[str, Any]
    ) -> Tensor:
        if past is None:
            loss = F.cross_entropy(logits, target, **options)
            self.log(loss)
            return loss
        loss, parts = pskd_cross_entropy(
            logits, target, past.probs, alpha, keep_hard=self.keep_hard, return_parts=True, **options
        )
        self._log_parts(parts.hard, parts.soft, past, target, logits.shape[1], options)
        return loss

    @outside_graphs
    def _log_parts(
        self, hard, soft, past: Prediction, target: Tensor, num_classes: int, options: Dict[str, Any]
    ) -> None:
        counted = None if target.is_floating_point() else target != options.get('ignore_index', -100)
        self.log(hard, soft, past.entropy(num_classes, counted))

    @outside_graphs
    def log(self, hard: Tensor, soft: Union[float, Tensor] = 0.0, entropy: Union[float, Tensor] = 0.0) -> None:
        """Keeps what a loss consisted of."""
        parts: Dict[str, Union[float, Tensor]] = dict(pskd_alpha=self.current_alpha, pskd_hard=hard.detach())
        parts.update(pskd_soft=soft, pskd_entropy=entropy)
        self.logs = {name: part.mean() if isinstance(part, Tensor) else part for name, part in parts.items()}
        if self.bank is not None and self.bank.skipped:
            self.logs['pskd_skipped'] = float(self.bank.skipped)

    def past_of(self, logits: Tensor, target: Tensor, *, keep: bool = True) -> Optional[Prediction]:
        """What was predicted for the batch; None where nothing was. What is predicted now is kept, unless ``keep`` is
        False (it may then have the shape of logits alone)."""
        if not (self._inside and torch.is_grad_enabled()):
            raise RuntimeError(
                'PSKD: the loss is for training, with gradients, in a loop over pskd.batches(); for validation use the '
                'plain one. (A prefetcher that takes batches ahead goes inside: '
                "PSKD(prefetcher, teacher='snapshot', ...))"
            )
        self._decide(logits, target)
        self.used, self.count = self.used + 1, self.count + 1
        return self._past_of_rows(logits, target, keep) if self.kind == 'bank' else self._past_of_call(logits)

    def _decide(self, logits: Tensor, target: Tensor) -> None:
        """``teacher='auto'``: before the first loss all that is known is that samples have an index."""
        if self.kind == 'auto':
            obstacle = self.misfit(logits, target) if self.model is not None else None
            if self.model is not None and _anywhere(obstacle is not None, logits.device):
                obstacle = obstacle or 'in another process samples may be mixed'
            self._take(choose_teacher('auto', obstacle))
            if self.kind == 'bank':
                self._calls.leave()

    def misfit(self, logits: Tensor, target: Tensor) -> Optional[str]:
        """Why predictions would not belong to the samples of the batch, each to one; None: they do."""
        assert self._rows is not None  # those of the batch under way
        expected = (len(self._rows), self.num_classes or (logits.shape[1] if logits.dim() > 1 else 1))
        if logits.shape != expected:
            return (
                f'the batch has {expected[0]} samples of {expected[1]} classes, so the bank wants logits {expected}, '
                f'got {tuple(logits.shape)} (pixels, tokens, or samples that the loop repeats?)'
            )
        if target.is_floating_point():
            return 'with probs as target, not class ids, samples may be mixed (Mixup, CutMix)'
        return None

    def _past_of_call(self, logits: Tensor) -> Optional[Prediction]:
        if self.alpha == 0:
            return None
        call = self._calls.of(logits)
        shape = call.shape if call.past is None else call.past.shape
        if shape not in (None, logits.shape):
            raise ValueError(
                f'PSKD: the past model gives logits {tuple(shape)} for the inputs of the model, but the loss is of '
                f'{tuple(logits.shape)}: give the loss what the model gives, or set outputs='
            )
        return None if call.past is None else Prediction(call.past, True)

    def _past_of_rows(self, logits: Tensor, target: Tensor, keep: bool) -> Optional[Prediction]:
        if self.used > 1:
            raise RuntimeError(
                'PSKD: a second loss in one batch: the bank keeps one prediction for each sample. Call the loss once, '
                f'for the whole batch (further heads learn with the plain loss), or {WAY_OUT}'
            )
        misfit = self.misfit(logits, target)
        if misfit:
            raise ValueError(f'PSKD: {misfit}: {WAY_OUT}')
        if self.bank is None:
            self.num_classes = logits.shape[1]
            self.past = self._make_bank(self.num_classes, logits.device)
            self.past.load_state_dict(self._saved)
            self.past.begin_step(self.data.step, self._rows)
        prediction = self.past.predict(target)
        if keep:
            self.past.observe(logits)
        if prediction is None or self.current_alpha == 0:
            return None
        return prediction.to(logits.device)

    tap = tap

    def listens(self) -> bool:
        """Whether a cross-entropy that is computed now is training's."""
        return self._inside and heard()

    def is_of_model(self, logits: Tensor, target: Tensor) -> bool:
        """Whether logits can be those of the loss: with a copy those that come from its model."""
        self._decide(logits, target)
        return self.kind == 'bank' or self.alpha == 0 or self._calls.knows(logits)

    # What Batches calls.

    def begin_epoch(self) -> bool:
        epoch = self.data.epoch
        each, length = (self.data.steps_per_epoch, self.max_steps) if self.max_steps else (1, self.max_epochs)
        assert each is not None
        assert length is not None  # of the two lengths one was given
        if epoch * each >= length and self.alpha != 0:
            what = f'step {epoch * each + 1} of max_steps' if self.max_steps else f'epoch {epoch + 1} of max_epochs'
            raise ValueError(f'PSKD: {what}={length}: alpha is for that many')
        new = super().begin_epoch()
        if new:  # criteria may change between epochs
            self.cross_entropies.clear()
            self.sees_log_probs = False
            self._looks = True
        self.synchronize()
        self._progress, self._inside = min((epoch if self.interval else epoch + 1) * each / length, 1.0), True
        if new and epoch:
            self.past.begin_period(unwrap(self.model))
        if self.model is not None and self.kind != 'bank' and self.alpha != 0:
            self._calls.watch(self.model)
        return new

    def begin_step(self, rows: Optional[Tensor], partners, batch) -> None:
        super().begin_step(rows, partners, batch)
        self._rows = rows
        self._calls.forget()
        self._calls.looks, self._looks = self._looks, False  # in an epoch's first batch
        self.past.begin_step(self.data.step, rows)

    def end_step(self) -> None:
        super().end_step()
        self._calls.forget()

    def after_update(self) -> None:
        self.past.after_update(unwrap(self.model))

    def end_epoch(self, finished: bool) -> None:
        self._inside = False
        self._calls.leave()
        super().end_epoch(finished)
        if finished:
            self.synchronize()

    def synchronize(self) -> None:
        """Makes the banks of all processes equal; an epoch ends with it. Call it in all of them before a checkpoint is
        saved in the middle of an epoch."""
        self.past.synchronize()

    def state_dict(self) -> Dict[str, Any]:
        """What a checkpoint must hold beside the model: plain tensors and numbers. Saved within an epoch, the resumed
        run begins this epoch anew, and the batch under way is not counted yet."""
        past = self._saved if type(self.past) is Past else self.past.state_dict(self._begun == self.data.epoch)
        return {**past, 'batches': self.data.state_dict(), 'kind': self.kind}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restores ``state_dict``; load the model first. With ``teacher='auto'`` the past is of the saved kind.

        Raises:
            ValueError: the state is another ``teacher``'s; or at the first loss, a bank's with other settings.
        """
        kind = state.get('kind', 'bank' if 'bank' in state else 'snapshot')
        if self.kind == 'auto':
            self._take(kind)
        if kind not in (self.kind, 'auto'):
            raise ValueError(f'PSKD: the state is of teacher={kind!r}: resume with the same teacher')
        self.data.load_state_dict(state['batches'])
        ours = ('batches', 'kind', 'tokens')
        self._saved = {name: value for name, value in state.items() if name not in ours and value is not None}
        self.past.load_state_dict(self._saved)
        self._begun = self.data.epoch if 'teacher' in state else None
        self._batches = self._plain = 0

    def resume_without_past(self, mid_period: bool) -> None:
        """In the place of ``load_state_dict``, where a checkpoint has no state."""
        self._begun = self.data.epoch if mid_period else None
        if mid_period or self.kind in ('auto', 'bank'):
            logger.warning('PSKD: the checkpoint holds no past predictions: plain training until there are some')


def _anywhere(here: bool, device: torch.device) -> bool:
    """Whether it is so in any process: all reach their first loss together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return here
    flag = torch.tensor(int(here), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)
