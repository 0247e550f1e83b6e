"""PS-KD with a bank of tokens: language models and token classification."""

import logging
from typing import Any, Dict, Mapping, Optional

import torch
from torch import Tensor

from selfkd.bank import PredictionBank, draw_top_k
from selfkd.losses import TopK
from selfkd.seeds import row_uniform
from selfkd.teacher import random_state

from .pskd import PSKD

__all__ = ['TokenPSKD']

logger = logging.getLogger(__name__)

TOP_K = 8
LABELS = ('labels', 'label', 'label_ids', 'input_ids')  # of a sample, the first that it has
LABELS_DIFFER = "where labels differ each time (masked language modelling, random crops), use teacher='snapshot'"
JOINED = ": joined into one (padding-free) it is not known which token is whose: use teacher='snapshot'"


class TokenPSKD(PSKD):
    """:class:`~selfkd_torch.PSKD` with a bank of tokens, where the loss has more rows than the batch has samples.

    A token's row is its place among the sample's tokens that have a label, counted from the last one, so that padding
    on either side changes nothing (padded on the left, a causal model also predicts a sample's first token).

    Samples are dicts with ``labels`` (or ``input_ids``), pairs (inputs, labels), or the tokens themselves. Where their
    labels are single ones, it is a :class:`PSKD`.

    Args:
        top_k: classes that the bank keeps of a token, some of them drawn. Defaults to 8.
        dtype: Defaults to float16.
    """

    def __init__(self, *args, **kwargs):
        self._offsets = None  # of tokens: the first row of each sample, and the end
        self._of_tokens: Optional[bool] = None  # whether the samples' labels are sequences, once one was looked at
        self._ignore_index = -100
        super().__init__(*args, **kwargs)

    def loss(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        self._ignore_index = options.get('ignore_index', -100)
        return super().loss(logits, target, **options)

    def _past_of_rows(self, logits: Tensor, target: Tensor):
        if self.used > 1 or not self._has_tokens():
            return super()._past_of_rows(logits, target)
        if target.dim() != 1 or len(target) % len(self._rows) or len(logits) != len(target):
            raise ValueError(f'PSKD: the loss is of {tuple(target.shape)} tokens for {len(self._rows)} samples{JOINED}')
        if self.bank is None:
            self._make_bank(logits.shape[1])
        labels = target.detach().cpu().view(len(self._rows), -1)
        real = labels != self._ignore_index
        first, end = self._offsets[self._rows][:, None], self._offsets[self._rows + 1][:, None]
        rows = end - real.flip(1).cumsum(1).flip(1)
        if (rows < first)[real].any():
            raise ValueError("PSKD: a sample has more labels than when the bank was made: use teacher='snapshot'")
        self.bank.check_labels(rows[real], labels[real], way_out=LABELS_DIFFER)
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

    def _has_tokens(self) -> bool:
        """Whether the samples' own labels are sequences. How many rows the loss has does not tell: a batch in which
        each sample has one label has as many as it has samples."""
        if self._of_tokens is None:
            with random_state(0, torch.device('cpu')):  # a look must not change what the samples to come draw
                self._of_tokens = _length(self.data.loader.dataset[0]) is not None
        return self._of_tokens

    def _make_bank(self, num_classes: int) -> None:
        if not self._has_tokens():
            super()._make_bank(num_classes)
            return
        dataset, options = self.data.loader.dataset, dict(self._bank)
        with random_state(0, torch.device('cpu')):
            lengths = torch.tensor([0, *(_length(dataset[i]) or 0 for i in range(len(dataset)))])
        self._offsets = lengths.cumsum(0)
        options['top_k'] = options['top_k'] or min(TOP_K, num_classes)
        options['dtype'] = options['dtype'] or torch.float16
        self.bank = PredictionBank(int(self._offsets[-1]), num_classes, **options)
        logger.info('PSKD: the token bank takes %.1f MB for %d samples', self.bank.nbytes / 1e6, len(dataset))

    def state_dict(self) -> Dict[str, Any]:
        return {**super().state_dict(), 'tokens': self._offsets is not None}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        if state.get('bank') is not None and self.teacher is None and state.get('tokens') != self._has_tokens():
            kinds = ('samples', 'tokens')
            raise ValueError(
                f"PSKD: the state's bank is of {kinds[bool(state.get('tokens'))]}, but the training set's samples have "
                f'labels for {kinds[self._has_tokens()]}: resume with the training set of the saved run'
            )
        super().load_state_dict(state)


def _length(sample) -> Optional[int]:
    """How many labels a sample can have: its own, or those that the collator makes of its tokens.

    None: it has a single one, or where they are is not known.
    """
    labels = sample  # the tokens themselves
    if isinstance(sample, Mapping):
        labels = next((sample[name] for name in LABELS if name in sample), None)
    elif isinstance(sample, (tuple, list)) and len(sample) > 1 and not isinstance(sample[0], int):
        labels = sample[1]  # (inputs, labels)
    try:
        shape = torch.as_tensor(labels).shape
    except (TypeError, ValueError, RuntimeError):
        return None
    return shape[0] if len(shape) == 1 else None
