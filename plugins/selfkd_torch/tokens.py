"""PS-KD with a bank of tokens: language models and token classification."""

import logging
from typing import Any, Dict

import torch
from torch import Tensor

from selfkd.bank import PredictionBank, draw_top_k
from selfkd.losses import TopK
from selfkd.seeds import row_uniform

from .pskd import PSKD

__all__ = ['TokenPSKD']

logger = logging.getLogger(__name__)

TOP_K = 8
JOINED = ": joined into one (padding-free) it is not known which token is whose: use teacher='snapshot'"


class TokenPSKD(PSKD):
    """:class:`~selfkd_torch.PSKD` with a bank of tokens, where the loss has more rows than the batch has samples.

    A token's row is its place among the sample's tokens that have a label, counted from the last one, so that padding
    on either side changes nothing (padded on the left, a causal model also predicts a sample's first token).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._offsets = None  # of tokens: the first row of each sample, and the end
        self._labels = None  # of each row, -1 where not known
        self._ignore_index = -100

    def loss(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        self._ignore_index = options.get('ignore_index', -100)
        return super().loss(logits, target, **options)

    def _past_of(self, logits: Tensor, target: Tensor):
        if self.teacher is not None or len(logits) == len(self._rows) or self._softened:
            return super()._past_of(logits, target)
        if target.dim() != 1 or len(target) % len(self._rows):
            raise ValueError(f'PSKD: the loss is of {tuple(target.shape)} tokens for {len(self._rows)} samples{JOINED}')
        if self.bank is None:
            self._make_token_bank(logits.shape[1])
        self._softened += 1
        labels = target.detach().cpu().view(len(self._rows), -1)
        real = labels != self._ignore_index
        first, end = self._offsets[self._rows][:, None], self._offsets[self._rows + 1][:, None]
        rows = end - real.flip(1).cumsum(1).flip(1)
        if (rows < first)[real].any():
            raise ValueError("PSKD: a sample has more labels than when the bank was made: use teacher='snapshot'")
        self._check_labels(rows[real], labels[real])
        rows, real = torch.where(real, rows, first).flatten(), real.flatten()  # without label: any row, it is ignored
        past, seen = self.bank.read_top_k(rows, return_seen=True)
        seen = seen & real
        here = real.to(logits.device)
        drawn = draw_top_k(logits, self.bank.top_k, row_uniform(rows, self.data.step))
        self.bank.write(rows[real], TopK(*(part[here] for part in drawn)))
        self._written.append((rows[real], self.data.step))
        if self.current_alpha == 0 or not seen.any():
            return None, None
        return TopK(*(part.to(logits.device, non_blocking=True) for part in past)), seen

    def check_not_joined(self, labels: Any, samples: int) -> None:
        """ValueError: the labels of a batch, if they are a tensor, are not of as many samples as the batch."""
        if isinstance(labels, Tensor) and len(labels) != samples:
            raise ValueError(f'PSKD: the labels are of {len(labels)} samples, but the batch has {samples}{JOINED}')

    def _make_token_bank(self, num_classes: int) -> None:
        dataset = self.data.loader.dataset
        lengths = torch.tensor([0, *(_length(dataset[i]) for i in range(len(dataset)))])
        self._offsets = lengths.cumsum(0)
        top_k = min(self._bank['top_k'] or TOP_K, num_classes)
        self.bank = PredictionBank(int(self._offsets[-1]), num_classes, top_k=top_k, dtype=torch.float16)
        self._labels = torch.full((self.bank.num_samples,), -1, dtype=torch.int32)
        logger.info('PSKD: the token bank takes %.1f MB for %d samples', self.bank.nbytes / 1e6, len(dataset))

    def _check_labels(self, rows: Tensor, labels: Tensor) -> None:
        old = self._labels[rows]
        if ((old != labels) & (old >= 0)).any():
            raise ValueError(
                'PSKD: the labels of a sample are not the ones they were before (masked language modelling, random '
                "crops), so that a row would belong to other tokens: use teacher='snapshot'"
            )
        self._labels[rows] = labels.to(self._labels.dtype)

    def state_dict(self) -> Dict[str, Any]:
        return {**super().state_dict(), 'tokens': self._offsets is not None}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        if state['tokens']:
            self._make_token_bank(state['bank']['num_classes'])
        super().load_state_dict(state)


def _length(sample) -> int:
    """How many labels a sample can have: its own, or those that the collator makes of its tokens."""
    labels = sample['labels'] if 'labels' in sample else sample['input_ids']
    return len(labels)
