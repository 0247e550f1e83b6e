"""Lets torch 2.6 and later load mmengine's checkpoints, which hold more than tensors, without trusting them further."""

import collections
import pickle
from _codecs import encode
from typing import Any, Callable, Tuple

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

    transformers' Trainer, when it resumes, allows numpy's arrays for a while and then forbids them. With torch 2.7 and
    later that takes nothing away from mmengine; with torch 2.6, in the same process, call this function after it.

    ``builtins.getattr``, which the pickle of a ``HistoryBuffer`` asks for, is not allowed: in its place stands a
    function that looks up the four statistics of ``HistoryBuffer`` and nothing else.
    """
    if not hasattr(torch.serialization, 'add_safe_globals'):  # torch below 2.4 loads everything
        return
    kinds: Tuple[Any, ...] = (HistoryBuffer, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in NUMBERS})
    kinds += (encode, collections.Counter)  # bytes, and the milestones of a schedule
    allowed = {f'{kind.__module__}.{kind.__qualname__}': kind for kind in kinds}
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):  # numpy 2's and numpy 1's
        for value in (np.zeros(0), np.float64(0)):  # what makes arrays, what makes scalars
            function: Any = value.__reduce__()[0]
            allowed[f'{module}.{function.__name__}'] = function
    allowed['builtins.getattr'] = _statistic
    if torch.__version__ >= (2, 7):  # type: ignore[operator]  # a TorchVersion, declared a str
        # Each with its name: what others allow and then forbid again, as bare types, leaves these pairs alone.
        torch.serialization.add_safe_globals([(value, path) for path, value in allowed.items()])
    else:
        torch.serialization.add_safe_globals([_named(path, value) for path, value in allowed.items()])


def _statistic(owner: object, name: str) -> Callable:
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not of an mmengine checkpoint: refused')
    return getattr(HistoryBuffer, name)


def _named(path: str, value: Callable) -> Callable:
    """For torch below 2.7, which takes no pairs: a type as it is, a function under the name by which a pickle asks."""
    if isinstance(value, type):
        return value

    def stand_in(*args):
        return value(*args)

    stand_in.__module__, _, stand_in.__qualname__ = path.rpartition('.')
    stand_in.__name__ = stand_in.__qualname__
    return stand_in
