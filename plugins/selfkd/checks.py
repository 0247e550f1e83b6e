"""What arguments must be: settings of the methods, for the plugins' constructors, and tensors that the core is given.

Values of tensors are looked at where that is free: on the CPU, and not while torch.func or torch.compile trace.
"""

import math
from numbers import Real
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .transfer import to_device

__all__ = ['at_least_zero', 'is_compiling', 'one_of', 'outside_graphs', 'positive', 'share']

REDUCTIONS = ('none', 'mean', 'sum')
# Sums of distributions are off by 1e-3 or so for storage in float16 and top-k renormalisation, and by half of float16's
# smallest step a class where there are very many.
SUM_TOLERANCE = 1e-2
HALF_STEP = 2**-25

# Where torch has them; bool() is False. Newer versions of torch have the first name of is_compiling.
is_compiling = getattr(getattr(torch, 'compiler', None), 'is_compiling', getattr(torch._utils, 'is_compiling', bool))
transforms_active = getattr(torch._C, '_are_functorch_transforms_active', bool)


def outside_graphs(function):
    """A function that torch.compile leaves alone: ``torch.compiler.disable``, without importing the compiler now."""
    return getattr(torch, '_disable_dynamo', lambda function: function)(function)


DIVERGED = 'training has diverged (a lower learning rate, warm-up or clipped gradients may help)'


def at_least_zero(user: str, **settings: float) -> None:
    """Refuses a setting below zero, infinite, or not a number.

    Args:
        user: what the message begins with: the hook or head that has the settings.
        settings: their names and values.

    Raises:
        ValueError: names the user, the setting, and its value.

    Example:
        >>> at_least_zero('CSKDHook', weight=-1)
        Traceback (most recent call last):
        ValueError: CSKDHook: weight must be at least 0, got -1
    """
    _numbers(user, settings)
    for name, value in settings.items():
        if not value >= 0:
            raise ValueError(f'{user}: {name} must be at least 0, got {value}')
        if value == math.inf:
            raise ValueError(f'{user}: {name} must be finite, got {value}')


def positive(user: str, **settings: float) -> None:
    """As [`at_least_zero`][], and refuses zero."""
    _numbers(user, settings)
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f'{user}: {name} must be above 0, got {value}')
    at_least_zero(user, **settings)


def share(user: str, **settings: float) -> None:
    """As [`at_least_zero`][], and refuses what is above one."""
    _numbers(user, settings)
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{user}: {name} must lie in [0, 1], got {value}')


def _numbers(user: str, settings: Dict[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
            raise ValueError(f'{user}: {name} must be a number, as 0.5, got {value!r}')


def one_of(user: str, allowed: Sequence[object], **settings: object) -> None:
    """Refuses a setting that is none of the allowed values."""
    for name, value in settings.items():
        if value not in allowed:
            raise ValueError(f'{user}: {name} must be one of {list(allowed)}, got {value!r}')


def tracing() -> bool:
    """Whether torch.func transforms or torch.compile are at work: no branches on values, no autograd functions."""
    return is_compiling() or transforms_active()


def free_to_look(values: Tensor) -> bool:
    """Whether a look at the values costs no device synchronisation and breaks no trace."""
    return values.device.type == 'cpu' and values.numel() > 0 and not tracing()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the core computes in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_logits(logits: Tensor, reduction: str, allowed: Sequence[str] = REDUCTIONS) -> None:
    if logits.dim() < 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise ValueError(f'logits: must be floating, [N, C, ...], got {logits.dtype}, {tuple(logits.shape)}')
    check_reduction(reduction, allowed)


def check_reduction(reduction: str, allowed: Sequence[str] = REDUCTIONS) -> None:
    if reduction not in allowed:
        raise ValueError(f'reduction: must be one of {tuple(allowed)}, got {reduction!r}')


def check_weight(name: str, weight: float) -> None:
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f'{name}: must be a number of at least 0, got {weight}')


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f'temperature: must be above 0, got {temperature}')


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor, hint: str = '') -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f'{name}: must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(tensor.shape)}{hint}'
        )


def check_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Class ids as int64."""
    expected = (logits.shape[0], *logits.shape[2:])
    if labels.shape != expected:
        raise ValueError(
            f'labels_or_probs: class ids must have shape {tuple(expected)} or probs {tuple(logits.shape)}, '
            f'got {tuple(labels.shape)}'
        )
    labels = labels.long()
    if free_to_look(labels):
        low, high = labels.aminmax()
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(
                f'labels_or_probs: class ids must lie in [0, {logits.shape[1]}) (or equal ignore_index), '
                f'got values from {low.item()} to {high.item()}'
            )
    return labels


def check_alpha(alpha: Union[float, Tensor], logits: Tensor) -> Union[float, Tensor]:
    """A number as it came; a tensor ``[N, ...]`` or ``[]`` as a constant beside the logits."""
    if isinstance(alpha, Tensor):
        samples = (logits.shape[0], *logits.shape[2:])
        if alpha.dim() and alpha.shape != samples:
            raise ValueError(f'alpha: a tensor must have shape {tuple(samples)} or (), got {tuple(alpha.shape)}')
        if free_to_look(alpha) and not (alpha.min() >= 0 and alpha.max() <= 1):
            raise ValueError(f'alpha: must lie in [0, 1], got values from {alpha.min()} to {alpha.max()}')
        return to_device(alpha.detach().to(wide(logits.dtype)), logits.device)
    if not 0 <= alpha <= 1:
        raise ValueError(f'alpha: must lie in [0, 1], got {alpha}')
    return alpha


def check_probs(name: str, probs: Tensor, shape: Tuple[int, ...], ignored: Optional[Tensor] = None) -> None:
    """Distributions over dimension 1; rows that are ``ignored``, bool ``[N, ...]``, may hold anything."""
    check = check_of_rows(name, probs, shape, ignored)
    if check is not None:
        probs = probs.detach()
        # A few samples at a time, so that the second look at them is at the cache.
        chunks = probs.split(max(1, 2**17 * len(probs) // probs.numel()))
        looks = [(chunk.sum(1, dtype=wide(probs.dtype)), chunk.amin(1)) for chunk in chunks]
        check(*map(torch.cat, zip(*looks)))


def check_of_rows(
    name: str, probs: Tensor, shape: Tuple[int, ...], ignored: Optional[Tensor] = None
) -> Optional[Callable[[Tensor, Tensor], None]]:
    """For a caller that reads the distributions anyway: the check to call with their sums and least values, if any."""
    if probs.shape != shape or not probs.is_floating_point():
        raise ValueError(f'{name}: must be floating with shape {tuple(shape)}, got {probs.dtype}, {tuple(probs.shape)}')
    if not free_to_look(probs):
        return None

    def check(sums: Tensor, lows: Tensor) -> None:
        _check_sums_and_lows(name, sums, lows, probs.shape[1], ignored)

    return check


def check_top_k(name: str, values: Tensor, classes: Tensor, logits: Tensor, ignored: Optional[Tensor] = None) -> None:
    """The kept probabilities and their classes, ``[N, k]``, beside logits ``[N, C]``; of rows that are ``ignored`` the
    values may be any."""
    if logits.dim() != 2 or values.shape != classes.shape or values.dim() != 2 or len(values) != len(logits):
        raise ValueError(
            f'{name}: TopK needs values and classes [N, k] beside logits [N, C], '
            f'got {tuple(values.shape)} and {tuple(classes.shape)} beside {tuple(logits.shape)}'
        )
    if free_to_look(values):
        rest = 1 - values.sum(1, dtype=torch.float32)
        sums = torch.where(rest > 0, torch.ones_like(rest), 1 - rest)  # what is left is spread over the others
        _check_sums_and_lows(name, sums, values.amin(1), values.shape[1], ignored)


def _check_sums_and_lows(name: str, sums: Tensor, lows: Tensor, num_classes: int, ignored: Optional[Tensor]) -> None:
    if ignored is not None:
        sums, lows = sums.masked_fill(ignored, 1), lows.masked_fill(ignored, 0)
    low, high = sums.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f'{name}: holds values that are not finite: {DIVERGED}')
    tolerance = SUM_TOLERANCE + HALF_STEP * num_classes
    if low < 1 - tolerance or high > 1 + tolerance or lows.min() < -SUM_TOLERANCE:
        raise ValueError(
            f'{name}: each distribution must be non-negative and sum to 1 over dimension 1, '
            f'got values from {lows.min().item():.4g} and sums from {low.item():.4g} to {high.item():.4g} '
            '(logits instead of probabilities?)'
        )
