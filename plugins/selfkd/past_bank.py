"""A past that is a bank: what the student predicted for each sample or token when it was last trained on it."""

import logging
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import PredictionBank
from .bank_sync import exchange_rows
from .options import check_momentum
from .past_base import Past, Prediction, check_kind
from .row_labels import NO_LABEL
from .seeds import row_uniform
from .side_file import LARGE, SideFile
from .topk import TopK, draw_top_k
from .transfer import to_device, to_host

__all__ = ['BankPast', 'TokenBankPast']

logger = logging.getLogger(__name__)


class BankPast(Past):
    """What the student predicted for each sample when it was last trained on it: the paper's way.

    It needs no extra forward pass.

    Args:
        bank: with a row for each sample.
        momentum: m in [0, 1): a row becomes ``m * row + (1 - m) * softmax(logits)``, an average over epochs. 0, the
            paper's, keeps the newest. For banks of whole rows.
        way_out: the end of messages, as ``"set teacher='snapshot'"``.

    Attributes:
        side: where a large bank is saved, once the plugin has told it the place.

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
        self.side = SideFile()

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

    def synchronize(self) -> None:
        self.bank.labels.land(wait=True)  # the last steps' labels, too
        exchange_rows(self.bank)

    def state_dict(self, mid_period: bool = True) -> Dict[str, Any]:
        if self.side.place and self.bank.nbytes >= LARGE:
            return {'bank': self.side.save(self.bank.state_dict(copy=False))}
        return {'bank': self.bank.state_dict()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        check_kind(state, 'bank')
        if 'bank' in state:
            bank = state['bank']
            self.bank.load_state_dict(self.side.load(bank) if 'file' in bank else bank)


class TokenBankPast(BankPast):
    """A few tokens of what the student predicted at each labelled position of each sample, drawn so that on average
    they are the prediction ([`draw_top_k`][selfkd.topk.draw_top_k]).

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
        """``rows``: the samples, as of [`BankPast`][]."""
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
        self.keep(draw_top_k(logits, *self.draw(logits.device)))

    def draw(self, device: torch.device) -> Tuple[int, Tensor]:
        """How tokens are drawn of the batch's positions: how many, and the random numbers ``[B * T]``."""
        return self.top_k, to_device(row_uniform(F.pad(self.rows, (0, 1)), self.step), device)[self._place]

    def keep(self, drawn: TopK) -> None:
        """In the place of ``observe``, what was drawn by ``draw``."""
        count, device = len(self.rows), drawn.values.device
        given = torch.zeros(count + 1, dtype=torch.bool, device=device)
        given[self._place] = True
        rows = [part.new_zeros(count + 1, self.top_k) for part in drawn]
        for part, row in zip(drawn, rows):
            row[self._place] = part
        self._write(TopK(*(row[:count] for row in rows)), given[:count])
