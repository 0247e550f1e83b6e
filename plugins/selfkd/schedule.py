"""How a self-distillation weight grows over training. ``progress`` is the share of training done, in [0, 1]."""

import math
from typing import Sequence, Union

__all__ = ['linear_growth', 'may_end_early', 'sigmoid_ramp_up']


def linear_growth(final: float, progress: float) -> float:
    r"""Linear growth from 0 to ``final``: PS-KD's :math:`\alpha_t = \alpha_T\, t / T` (ICCV 2021, eq. 4).

    Counted in epochs the paper uses ``progress = (epoch + 1) / max_epochs`` with epochs from 0.

    Example:
        >>> [round(linear_growth(0.8, (epoch + 1) / 4), 2) for epoch in range(4)]
        [0.2, 0.4, 0.6, 0.8]
    """
    return final * _check_progress(progress)


def may_end_early(user: str, alpha: Union[float, str], training: str, stops: Sequence[str]) -> str:
    """The warning for a training that something may end before alpha has grown up.

    Args:
        user: what the message begins with: the hook or callback.
        alpha: the final share, or words for it.
        training: what it grows over, as ``'90 epochs'``.
        stops: what may end the training, by their names in the toolkit.

    Example:
        >>> may_end_early('PSKD', 0.8, '90 epochs', ['EarlyStopping'])
        'PSKD: alpha grows up to 0.8 over 90 epochs; where EarlyStopping ends training earlier, it does not get there'
    """
    return (
        f'{user}: alpha grows up to {alpha} over {training}; where {" or ".join(stops)} ends training earlier, it does '
        'not get there'
    )


def sigmoid_ramp_up(progress: float) -> float:
    r"""The ramp :math:`\exp(-5 (1 - s)^2)` from exp(-5) to 1, FRSKD's for segmentation.

    Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017
    https://arxiv.org/abs/1610.02242

    Example:
        >>> [round(sigmoid_ramp_up(s), 3) for s in (0, 0.5, 1)]
        [0.007, 0.287, 1.0]
    """
    return math.exp(-5 * (1 - _check_progress(progress)) ** 2)


def _check_progress(progress: float) -> float:
    if not 0 <= progress <= 1:
        raise ValueError(f'progress: must lie in [0, 1], got {progress}')
    return progress
