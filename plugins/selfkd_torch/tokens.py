"""PS-KD with a bank of tokens: language models and token classification."""

import logging
import operator
from typing import Any, Dict, Iterable, List, Mapping, Optional, Union

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from selfkd.defaults import PSKD as DEFAULTS
from selfkd.losses import TopK, linear_pskd_loss
from selfkd.past import BankPast, Prediction, TokenBankPast
from selfkd.renamed import renamed
from selfkd.teacher import random_state

from .pskd import PSKD

__all__ = ['TokenPSKD']

logger = logging.getLogger(__name__)

LABELS = ('labels', 'label', 'label_ids', 'input_ids')  # of a sample, the first that it has
LABELS_DIFFER = "where labels differ each time (masked language modelling, random crops), use teacher='snapshot'"


class TokenPSKD(PSKD):
    """[`PSKD`][selfkd_torch.PSKD] with a bank of tokens, where the loss has more rows than the batch has samples.

    See [`selfkd.past.TokenBankPast`][]. Samples are dicts with ``labels`` (or ``input_ids``), pairs (inputs,
    labels), or the tokens themselves. Where their labels are single ones, it is a [`PSKD`][].

    Args:
        top_k: classes that the bank keeps of a token, some of them drawn. Defaults to 8 for tokens.
        bank_dtype: Defaults to float16 for tokens.
        bank_device: Defaults to the CPU for tokens.
    """

    task = 'language models'

    @renamed(dtype='bank_dtype', device='bank_device')
    def __init__(self, *args, bank_dtype: Union[str, torch.dtype, None] = None, **options):
        self.of_tokens: Optional[bool] = None  # whether the samples' labels are sequences, once one was looked at
        self.joined = False  # whether it was seen that a batch has its samples in one row
        self._ignore_index = -100
        super().__init__(*args, bank_dtype=bank_dtype, **options)

    def loss(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        self._ignore_index = options.get('ignore_index', -100)
        return super().loss(logits, target, **options)

    def linear_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Optional[Tensor] = None,
        ignore_index: int = -100,
        reduction: str = 'mean',
    ) -> Tensor:
        """``loss`` of ``hidden @ weight.T + bias``, logits that never exist: with a bank of tokens.

        Args:
            hidden: ``[B * T, D]``, in the dtype of ``weight``.
            weight, bias: of the output layer, ``[V, D]`` and ``[V]``.
            target: class ids ``[B * T]``.
            ignore_index, reduction: as of ``selfkd.losses.linear_pskd_loss``.

        Raises:
            ValueError: the past is not a bank of tokens.
        """
        self._ignore_index = ignore_index
        logits = hidden.new_empty(()).expand(len(hidden), len(weight))  # their shape, and no memory
        past = self.past_of(logits, target, keep=False)
        if not isinstance(self.past, TokenBankPast):
            raise ValueError("PSKD: linear_loss needs a bank of tokens: set teacher='bank', or use loss()")
        options: Dict[str, Any] = dict(bias=bias, ignore_index=ignore_index, reduction=reduction)
        options.update(keep_hard=self.keep_hard, draw=self.past.draw(hidden.device), return_parts=True)
        if past is None:
            loss, parts, drawn = linear_pskd_loss(hidden, weight, target, None, 0.0, **options)
            self.log(parts.hard)
        else:
            alpha, probs = past.alpha(self.current_alpha), TopK(*past.probs)
            loss, parts, drawn = linear_pskd_loss(hidden, weight, target, probs, alpha, **options)
            self.log(parts.hard, parts.soft, past.entropy(len(weight), target != ignore_index))
        self.past.keep(drawn)
        return loss

    def past_of(self, logits: Tensor, target: Tensor, *, keep: bool = True) -> Optional[Prediction]:
        if isinstance(self.past, TokenBankPast):
            self.past.ignore_index = self._ignore_index
        return super().past_of(logits, target, keep=keep)

    def misfit(self, logits: Tensor, target: Tensor) -> Optional[str]:
        if not self._has_tokens():
            return super().misfit(logits, target)
        assert self._rows is not None  # those of the batch under way
        if self.joined or target.dim() != 1 or len(target) % len(self._rows) or len(logits) != len(target):
            return (
                f'the loss is of {tuple(target.shape)} tokens for {len(self._rows)} samples: joined into one '
                '(padding-free), or cut, it is not known which token is whose'
            )
        return None

    def _has_tokens(self) -> bool:
        """Whether the samples' own labels are sequences. How many rows the loss has does not tell: a batch in which
        each sample has one label has as many as it has samples. What cannot be looked at is taken for tokens."""
        if self.of_tokens is None:
            dataset: Any = getattr(self.data.loader, 'dataset', None)
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__getitem__'):
                return True
            with random_state(0, torch.device('cpu')):  # a look must not change what the samples to come draw
                self.of_tokens = _length(dataset[0]) is not None
        return self.of_tokens

    def _make_bank(self, num_classes: int, device: torch.device) -> BankPast:
        if not self._has_tokens():
            return super()._make_bank(num_classes, device)
        dataset, options = self.data.loader.dataset, self._settings
        if options['bank_momentum']:
            raise ValueError(
                'PSKD: bank_momentum averages whole rows, and of a token a few classes are kept: remove it'
            )
        with random_state(0, torch.device('cpu')):
            lengths = _lengths(dataset)
        return TokenBankPast(
            lengths,
            num_classes,
            top_k=options['top_k'] or min(DEFAULTS['top_k']['language models'], num_classes),
            dtype=options['bank_dtype'] or DEFAULTS['bank_dtype']['language models'],
            device=options['bank_device'] or 'cpu',
            ignore_index=self._ignore_index,
            way_out=LABELS_DIFFER,
        )

    def state_dict(self) -> Dict[str, Any]:
        state = super().state_dict()
        return {**state, 'tokens': self._has_tokens()} if 'bank' in state else state

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        kinds, saved = ('samples', 'tokens'), bool(state.get('tokens'))
        if state.get('bank') and self.kind in ('auto', 'bank') and saved != self._has_tokens():
            raise ValueError(
                f"PSKD: the state's bank is of {kinds[saved]}, but the training set's samples have labels for "
                f'{kinds[self._has_tokens()]}: resume with the training set of the saved run'
            )
        super().load_state_dict(state)


def _lengths(dataset) -> List[int]:
    """How many labels each sample can have: as the data set says (``tgt_sizes`` or ``sizes``, which fairseq's have), or
    else as all of its samples show."""
    for name in ('tgt_sizes', 'sizes'):
        try:
            lengths = [operator.index(size) for size in getattr(dataset, name)]
        except (AttributeError, TypeError):  # none, or not a number for each sample
            continue
        if len(lengths) == len(dataset) and lengths[0] >= (_length(dataset[0]) or 0):  # else of something else
            return lengths
    logger.info('PSKD: reads all %d samples once, to count their labels', len(dataset))
    return [_length(dataset[i]) or 0 for i in _with_bar(range(len(dataset)))]


def _with_bar(numbers: range) -> Iterable[int]:
    """With a progress bar in a terminal, once it has taken some seconds, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return numbers
    return tqdm(numbers, desc='PSKD: counts labels', delay=3, disable=None, leave=False)


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
