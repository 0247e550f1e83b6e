"""How a bank keeps a row: whole or as a few classes, in floats or in bytes. All that knows of a storage is here.

A new storage is a class like ``Floats`` and a line in ``KINDS``: options, messages, exchange and checkpoints
follow.
"""

from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor

from .checks import DIVERGED, check_probs
from .seeds import row_uniform
from .topk import TopK
from .transfer import to_device

__all__ = ['KINDS', 'Storage', 'storage_name']

Rows = Tuple[Tensor, ...]


class Floats:
    """Values as numbers of a torch dtype, rounded to the nearest."""

    whole = False  # whether the values of a row must sum to 1

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def encode(self, values: Tensor, rows: Tensor, step: int) -> Tensor:
        return values.to(self.dtype)

    def decode(self, values: Tensor) -> Tensor:
        return values.float()


class LogBytes:
    """Values in a byte each, as powers of 2 in steps of 1/16 octave, from 2^-15.8 to 1, and 0.

    A value is rounded up or down at random such that it is right on average: nearest rounding would err in the same
    direction in every epoch. The largest of a row is what the others leave of 1, so that rows sum to 1.

    Whether a value goes up follows from one random number for the row and the fractions of the values before it
    (systematic sampling). So as many go up as should, to within one, and the errors of a row do not add up.
    """

    whole, dtype = True, torch.uint8
    largest = 255  # the code of the largest value
    bits = 16  # of fractions, which are added as integers: exactly, and so the same in any order
    # torch seeds its generator with 32 bits. The numbers must not be those that tokens are drawn by.
    seed = 2**31

    def __init__(self) -> None:
        self.levels = torch.cat(
            [torch.zeros(1, device='cpu'), torch.exp2((torch.arange(1, 255, device='cpu') - 254) / 16)]
        )
        self.gaps = self.levels.diff()

    def encode(self, values: Tensor, rows: Tensor, step: int) -> Tensor:
        # Rows that are not finite are encoded to anything: the bank does not keep them.
        values = values.float().nan_to_num(0.0, 0.0, 0.0)
        low = (values.log2() * 16 + 254).clamp_(0, len(self.gaps) - 1).int()
        part = ((values - self._at(self.levels, low)) / self._at(self.gaps, low)).clamp_(0, 1)
        part = (part * 2**self.bits).round_().long()
        largest = values.argmax(1, keepdim=True)
        part.scatter_(1, largest, 0)
        start = to_device((row_uniform(rows, self.seed + step) * 2**self.bits).long(), values.device)[:, None]
        ends = part.cumsum(1) + start
        codes = low + (ends >> self.bits) - (ends - part >> self.bits)
        return codes.scatter_(1, largest, self.largest).to(self.dtype)

    def decode(self, values: Tensor) -> Tensor:
        largest = values == self.largest
        others = self._at(self.levels, values.int().masked_fill_(largest, 0))
        return torch.where(largest, (1 - others.sum(1, keepdim=True)).clamp_(min=0), others)

    @staticmethod
    def _at(table: Tensor, codes: Tensor) -> Tensor:
        return to_device(table, codes.device).index_select(0, codes.flatten()).view(codes.shape)


# By name, the largest first.
KINDS: Dict[str, Any] = {'float32': Floats(torch.float32), 'float16': Floats(torch.float16), 'log8': LogBytes()}


def storage_name(name: str, dtype: Union[str, torch.dtype]) -> str:
    """The storage that a setting asks for, by its name or as a dtype of torch.

    Raises:
        ValueError: there is none; begins with ``name``.

    Example:
        >>> storage_name('bank_dtype', torch.float16)
        'float16'
    """
    found = str(dtype).replace('torch.', '')
    if found not in KINDS:
        raise ValueError(f'{name}: must be one of {list(KINDS)}, got {dtype!r}')
    return found


class Storage:
    """How rows of probabilities become rows of tables, and back.

    Args:
        num_classes: C.
        top_k: keep the k largest probabilities and their class ids; None keeps all.
        dtype: a name in ``KINDS``, or the dtype of torch with that name.

    Attributes:
        tables: dtype and columns of each table, by its name in checkpoints.
        row_bytes: what a row takes in all of them.

    Example:
        >>> storage = Storage(4, top_k=2, dtype='float16')
        >>> storage.tables
        {'values': (torch.float16, 2), 'classes': (torch.int16, 2)}
        >>> rows = storage.encode(torch.tensor([[0.5, 0.25, 0.125, 0.125]]), rows=torch.tensor([0]))
        >>> storage.decode(rows).dense(4)
        tensor([[0.5000, 0.2500, 0.1250, 0.1250]])
    """

    def __init__(self, num_classes: int, *, top_k: Optional[int] = None, dtype: Union[str, torch.dtype] = 'float32'):
        if num_classes < 2:
            raise ValueError(f'num_classes: must be at least 2, got {num_classes}')
        if top_k is not None and not 1 <= top_k <= num_classes:
            raise ValueError(f'top_k: must lie in [1, num_classes={num_classes}] or be None, got {top_k}')
        self.num_classes, self.top_k, self.name = num_classes, top_k, storage_name('dtype', dtype)
        self.kind = KINDS[self.name]
        self.tables: Dict[str, Tuple[torch.dtype, int]] = {'values': (self.kind.dtype, num_classes)}
        if top_k is not None:  # the mass of the other classes is a value, too, where all must sum to 1
            self.tables['values'] = (self.kind.dtype, top_k + self.kind.whole)
            self.tables['classes'] = (torch.int16 if num_classes <= 2**16 else torch.int32, top_k)
        self.row_bytes = sum(torch.zeros(0, dtype=dtype).element_size() * n for dtype, n in self.tables.values())

    def smaller(self) -> List[str]:
        """Ways to store rows in fewer bytes, in words."""
        names = list(KINDS)
        fewer = ['set top_k (16 is plenty)' if self.top_k is None else f'lower top_k (now {self.top_k})']
        return fewer + [f'set dtype={name!r}' for name in names[names.index(self.name) + 1 :]]

    def check(self, probs: Union[Tensor, TopK]) -> Tensor:
        """Refuses what are no rows of this storage; values are looked at on the CPU only.

        Returns:
            which rows are finite, bool ``[B]``, on their device.
        """
        values = probs.values if isinstance(probs, TopK) else probs
        if isinstance(probs, TopK):
            if self.top_k is None or values.shape[1] != self.top_k:
                raise ValueError(f'probs: TopK must keep top_k={self.top_k} classes, got {values.shape[1]}')
            if values.device.type == 'cpu' and not values.isfinite().all():
                raise ValueError(f'probs: holds values that are not finite: {DIVERGED}')
        elif values.dim() != 2 or values.shape[1] != self.num_classes or not values.is_floating_point():
            raise ValueError(
                f'probs: must be floating, [B, {self.num_classes}], got {values.dtype}, {tuple(values.shape)}'
            )
        else:
            check_probs('probs', values, values.shape)
        here = values.device.type == 'cpu'
        return torch.ones(len(values), dtype=torch.bool, device='cpu') if here else values.isfinite().all(1)

    def encode(self, probs: Union[Tensor, TopK], rows: Tensor, step: int = 0) -> Rows:
        """Rows of the tables.

        Args:
            probs: ``[B, C]``, or with ``top_k`` also [`TopK`][selfkd.topk.TopK].
            rows: their numbers, int64 ``[B]``, on the CPU, and
            step: that of the training: random rounding follows from the two.
        """
        if self.top_k is None:
            return (self.kind.encode(probs, rows, step),)
        values, classes = probs if isinstance(probs, TopK) else probs.topk(self.top_k, dim=1)
        if self.kind.whole:
            values = torch.cat([values, (1 - values.sum(1, keepdim=True)).clamp_(min=0)], dim=1)
        # Ids above 32,767 become negative 16-bit numbers: torch has no whole set of operations for unsigned ones.
        return self.kind.encode(values, rows, step), classes.to(self.tables['classes'][0])

    def decode(self, tables: Rows) -> Union[Tensor, TopK]:
        """float32 probs ``[B, C]``, or with ``top_k`` [`TopK`][selfkd.topk.TopK], of rows of the tables."""
        values = self.kind.decode(tables[0])
        return values if self.top_k is None else TopK(values[:, : self.top_k], self._ids(tables[1]))

    def _ids(self, classes: Tensor) -> Tensor:
        return classes.long() & 0xFFFF if self.tables['classes'][0] == torch.int16 else classes.long()

    def settings(self) -> Dict[str, Any]:
        return {'num_classes': self.num_classes, 'top_k': self.top_k, 'dtype': self.name}

    @staticmethod
    def settings_of(state: Mapping[str, Any]) -> Dict[str, Any]:
        """``settings`` by which a bank's state was stored."""
        top_k = state['classes'].shape[1] if 'classes' in state else None
        saved = state['values'].dtype  # tells it in states of versions that did not write the name
        dtype = next((name for name, kind in KINDS.items() if kind.dtype == saved), str(saved))
        return {'num_classes': state['num_classes'], 'top_k': top_k, 'dtype': state.get('dtype', dtype)}

    def is_damaged(self, tables: Rows) -> bool:
        """Whether values are not finite, or class ids out of range."""
        ids = torch.zeros(1) if self.top_k is None else self._ids(tables[1])
        finite = not tables[0].is_floating_point() or tables[0].isfinite().all()
        return not finite or bool(ids.min() < 0 or ids.max() >= self.num_classes)
