"""Lets torch 2.6 and later load mmengine's checkpoints, which hold more than tensors, without trusting them further."""

import collections
import pickle
from _codecs import encode
from typing import Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

__all__ = ['allow_mmengine_checkpoints']

NUMBERS = '?' + np.typecodes['AllInteger'] + np.typecodes['Float']


def allow_mmengine_checkpoints() -> None:
    """Adds to ``torch.load``'s safe globals what mmengine saves: the log's ``HistoryBuffer`` and numpy's numbers.

    From torch 2.6 on, ``torch.load`` refuses whatever is not on that list, and mmengine (0.10.7) calls it as it always
    did: training cannot be resumed, and ``load_from`` does not load. Importing ``selfkd_mmengine`` calls this function.
    A checkpoint with anything else in it is refused as before, arrays of objects included.

    ``builtins.getattr``, which the pickle of a ``HistoryBuffer`` asks for, is not allowed: in its place stands a
    function that looks up the four statistics of ``HistoryBuffer`` and nothing else.
    """
    if not hasattr(torch.serialization, 'add_safe_globals'):  # torch below 2.4 loads everything
        return
    allowed = [HistoryBuffer, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in NUMBERS}]
    allowed += [encode, collections.Counter]  # bytes, and the milestones of a schedule
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):  # numpy 2's and numpy 1's
        for value in (np.zeros(0), np.float64(0)):  # what makes arrays, what makes scalars
            function = value.__reduce__()[0]
            allowed.append(_named(f'{module}.{function.__name__}', function))
    torch.serialization.add_safe_globals([*allowed, _named('builtins.getattr', _statistic)])


def _statistic(owner: object, name: str) -> Callable:
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not of an mmengine checkpoint: refused')
    return getattr(HistoryBuffer, name)


def _named(path: str, function: Callable) -> Callable:
    """The function, under the name by which a pickle asks for it (torch 2.6 takes no pairs of function and name)."""

    def stand_in(*args):
        return function(*args)

    stand_in.__module__, _, stand_in.__qualname__ = path.rpartition('.')
    stand_in.__name__ = stand_in.__qualname__
    return stand_in
