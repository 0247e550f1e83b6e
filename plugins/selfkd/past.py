"""Where PS-KD's past predictions come from: a bank of predictions or tokens, a snapshot or an average of the weights.

A plugin makes one of them, calls its moments, and says where rows, inputs, periods and the loss are. A period is an
epoch, or an interval of iterations. In the first one there is no past, whatever its source.
"""

import logging
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .bank import PredictionBank
from .bank_sync import exchange_rows
from .options import check_momentum
from .row_labels import NO_LABEL
from .seeds import row_uniform
from .teacher import HALF, SnapshotTeacher
from .topk import TopK, draw_top_k
from .transfer import to_device, to_host

__all__ = ['AveragePast', 'BankPast', 'CopyPast', 'Past', 'Prediction', 'SnapshotPast', 'TokenBankPast']
__all__ += ['check_kind', 'copy_past']

logger = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """Past predictions of a batch.

    Attributes:
        probs: ``[N, C, ...]``, or :class:`~selfkd.topk.TopK`; a constant.
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

    In the order of a training: :meth:`load_state_dict` (resumed), then for each period :meth:`begin_period`, for each
    step :meth:`begin_step`, :meth:`begin_forward` before the student's forward pass, and at the loss :meth:`predict`
    and then :meth:`observe`. ``ready`` says whether there is a past to learn from.
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
        :meth:`begin_period`, so that a snapshot would be the saved weights themselves.
        """
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; ``{}`` where a checkpoint has nothing.

        Raises:
            ValueError: the state is another source's, or a bank's with other settings.
        """


class BankPast(Past):
    """What the student predicted for each sample when it was last trained on it: the paper's way.

    It needs no extra forward pass.

    Args:
        bank: with a row for each sample.
        momentum: m in [0, 1): a row becomes ``m * row + (1 - m) * softmax(logits)``, an average over epochs. 0, the
            paper's, keeps the newest. For banks of whole rows.
        way_out: the end of messages, as ``"set teacher='snapshot'"``.

    Raises:
        ValueError: a momentum out of range, or beside ``top_k``, whose rows cannot be averaged.

    Example:
        >>> past = BankPast(PredictionBank(4, 2), way_out="set teacher='snapshot'")
        >>> rows, labels = torch.tensor([3, 1]), torch.tensor([0, 1])
        >>> for step in range(2):
        ...     past.begin_step(step, rows)
        ...     prediction = past.predict(labels)
        ...     past.observe(torch.zeros(2, 2))
        >>> prediction.probs, prediction.known
        (tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]]), tensor([True, True]))
    """

    def __init__(self, bank: PredictionBank, *, momentum: float = 0.0, way_out: str):
        check_momentum(momentum, bank.top_k)
        self.bank, self.momentum, self.way_out = bank, momentum, way_out
        self.step, self.rows = 0, torch.zeros(0, dtype=torch.long, device='cpu')
        self._past: Optional[Prediction] = None
        # Rows written since the last exchange, which of them, and when.
        self._unsent: List[Tuple[Tensor, Optional[Tensor], int]] = []

    @property
    def skipped(self) -> int:
        """Predictions that were not finite, and so did not enter the bank."""
        return self.bank.skipped

    def begin_step(self, step: int, rows: Optional[Tensor] = None) -> None:
        assert rows is not None, 'a bank needs the rows of the batch'
        self.step, self.rows, self._past = step, rows, None

    def predict(self, target: Tensor) -> Optional[Prediction]:
        """Past predictions of samples with these labels.

        Raises:
            ValueError: a label is not that of its row: the samples are not those of the rows.
        """
        self.bank.check_labels(self.rows, target, way_out=self.way_out)
        probs, known = (self.bank.read_top_k if self.bank.top_k else self.bank.read)(self.rows, return_seen=True)
        self._past = Prediction(probs, known) if known.any() else None
        self.ready = self.ready or self._past is not None
        return self._past

    def observe(self, logits: Tensor) -> None:
        probs = logits.detach().float().softmax(1)
        if self.momentum and self._past is not None:
            past, known = (to_device(torch.as_tensor(part), probs.device) for part in self._past)
            probs = torch.where(known[:, None], self.momentum * past + (1 - self.momentum) * probs, probs)
        self._write(probs)

    def _write(self, probs: Union[Tensor, TopK], given: Optional[Tensor] = None) -> None:
        self.bank.write(self.rows, probs, given=given, step=self.step)
        self._unsent.append((self.rows, given, self.step))

    def synchronize(self) -> None:
        self.bank.labels.land(wait=True)  # the last steps' labels, too
        none = torch.zeros(0, dtype=torch.long, device='cpu')  # a process may have written nothing
        written = [(rows if given is None else rows[given.cpu()], step) for rows, given, step in self._unsent]
        rows = torch.cat([none, *(rows for rows, _ in written)])
        steps = torch.cat([none, *(torch.full_like(rows, step) for rows, step in written)])
        exchange_rows(self.bank, rows, steps)
        self._unsent = []

    def state_dict(self, mid_period: bool = True) -> Dict[str, Any]:
        return {'bank': self.bank.state_dict()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        check_kind(state, 'bank')
        if 'bank' in state:
            self.bank.load_state_dict(state['bank'])


class TokenBankPast(BankPast):
    """A few tokens of what the student predicted at each labelled position of each sample, drawn so that on average
    they are the prediction (:func:`~selfkd.topk.draw_top_k`).

    A position's row is its place among the sample's labelled ones, counted from the last, so that padding on either
    side changes nothing (padded on the left, a causal model predicts a sample's first token, too).

    Which positions have a label is known on the labels' device alone, and nobody waits for it: all rows of a sample,
    which the host knows, are read and written, and the device finds each position's among them.

    Args:
        lengths: how many labelled positions each sample can have, ``[S]``.
        num_classes: V, the vocabulary.
        top_k: tokens kept of a position.
        dtype: how probabilities are stored.
        device: where the bank lives.
        ignore_index: the label of positions that have none (padding).
        way_out: the end of messages.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        num_classes: int,
        *,
        top_k: int,
        dtype: Union[str, torch.dtype] = 'float16',
        device: Union[str, torch.device] = 'cpu',
        ignore_index: int = -100,
        way_out: str,
    ):
        self.lengths = torch.as_tensor(lengths, device='cpu').long()
        self.ends = self.lengths.cumsum(0)
        bank = PredictionBank(int(self.ends[-1]), num_classes, top_k=top_k, dtype=dtype, device=device)
        super().__init__(bank, way_out=way_out)
        self.top_k, self.ignore_index = top_k, ignore_index
        self.samples = self.rows
        # Of each position, its place among the rows; of those without a label, the place behind them.
        self._place = torch.zeros(0, dtype=torch.long, device='cpu')
        self._too_long: List[Tuple[Tensor, Optional[torch.cuda.Event]]] = []  # on its way from an accelerator
        logger.info('PS-KD: the token bank takes %.1f MB for %d samples', bank.nbytes / 1e6, len(self.ends))

    def begin_step(self, step: int, rows: Optional[Tensor] = None) -> None:
        """``rows``: the samples, as of :class:`BankPast`."""
        super().begin_step(step, rows)
        self.samples = self.rows

    def predict(self, target: Tensor) -> Optional[Prediction]:
        """Past predictions of all positions, N = B * T.

        Args:
            target: labels ``[B, T]``, or ``[B * T]``.

        Raises:
            ValueError: a label is not that of its row, or a sample has more than when the bank was made; of labels on
                an accelerator a step or two later.
        """
        labels = target.detach().view(len(self.samples), -1)
        lengths = self.lengths[self.samples]
        ends = lengths.cumsum(0)
        count = int(lengths.sum())
        shifts = (self.ends[self.samples] - ends).repeat_interleave(lengths, output_size=count)
        self.rows = torch.arange(count, device='cpu') + shifts
        ends, lengths = to_device(torch.stack([ends, lengths])[:, :, None], labels.device)

        real = labels != self.ignore_index
        from_last = real.flip(1).cumsum(1).flip(1)  # from 1, the last one's
        (found,), event = to_host((from_last > lengths).any())
        self._too_long.append((found, event))
        self._refuse_if_too_long()
        real &= from_last <= lengths
        self._place = (ends - from_last).masked_fill(~real, count).flatten()
        of_rows = labels.new_full((count + 1,), NO_LABEL)
        of_rows[self._place] = labels.flatten()
        self.bank.check_labels(self.rows, of_rows[:count], way_out=self.way_out)

        past, seen = self.bank.read_top_k(F.pad(self.rows, (0, 1)), return_seen=True)
        if not seen[:count].any():
            return None
        self.ready = True
        probs = TopK(*(to_device(part, labels.device)[self._place] for part in past))
        return Prediction(probs, to_device(seen, labels.device)[self._place] & real.flatten())

    def synchronize(self) -> None:
        self._refuse_if_too_long(wait=True)  # the last steps', too
        super().synchronize()

    def _refuse_if_too_long(self, wait: bool = False) -> None:
        while self._too_long:
            found, event = self._too_long[0]
            if event is not None:
                if not (wait or event.query()):
                    return
                event.synchronize()
            del self._too_long[0]
            if found:
                raise ValueError(
                    'PS-KD: a sample has more labels than when the bank was made. Do the data set or the collate '
                    f'function move or change samples? Leave them as they are, or {self.way_out}'
                )

    def observe(self, logits: Tensor) -> None:
        """``logits``: ``[B * T, V]``, or log-probabilities."""
        count = len(self.rows)
        uniform = to_device(row_uniform(F.pad(self.rows, (0, 1)), self.step), logits.device)[self._place]
        drawn = draw_top_k(logits, self.top_k, uniform)
        given = torch.zeros(count + 1, dtype=torch.bool, device=logits.device)
        given[self._place] = True
        rows = [part.new_zeros(count + 1, self.top_k) for part in drawn]
        for part, row in zip(drawn, rows):
            row[self._place] = part
        self._write(TopK(*(row[:count] for row in rows)), given[:count])


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
        self.teacher.take_mode(model)  # at the copy's birth the model may not have been in the mode that it trains in
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


def check_kind(state: Dict[str, Any], ours: str) -> None:
    """Refuses the state of another source of the past than the one that keeps its own under the key ``ours``."""
    kinds = {'bank': 'bank', 'teacher': 'snapshot', 'average': 'ema'}
    saved = next((kind for kind in kinds if kind in state), ours)
    if saved != ours:
        raise ValueError(
            f"PS-KD: the checkpoint's past is of teacher={kinds[saved]!r}, and this run's of teacher={kinds[ours]!r}: "
            'resume with the same teacher, or load the weights without resuming'
        )
