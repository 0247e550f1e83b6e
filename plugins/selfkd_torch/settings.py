"""PS-KD's settings in a loop of one's own, in Lightning and in the Trainer: what they may be, and which ones act."""

import logging
from typing import Any, Dict, List, Optional, Union

import torch

from selfkd.checks import one_of, share
from selfkd.defaults import PSKD
from selfkd.past import TEACHERS, check_momentum, refuse_without_past
from selfkd.teacher import MODES

from .batches import Batches, length_of

__all__ = ['check_settings', 'dtype_of', 'steps_of', 'warn_without_effect']

logger = logging.getLogger(__name__)

BANK = ('top_k', 'bank_dtype', 'bank_device', 'bank_momentum')
COPY = ('teacher_mode', 'interval', 'model', 'outputs')
ACTS = {'bank': BANK, 'snapshot': COPY, 'ema': (*COPY, 'ema_decay')}
ONE_DEFAULT = {name: value for name, value in PSKD.items() if not isinstance(value, dict)}
DTYPES = {'float32': torch.float32, 'float16': torch.float16}


def check_settings(user: str, *, alpha: Optional[float], teacher: str, **settings: Any) -> None:
    """Refuses what is out of range, and what a teacher that was named has no use for.

    Args:
        user: what messages begin with.
        alpha: None where it depends on the task.
        teacher: one of the core's.
        settings: of a bank and of a copy, by their names.

    Raises:
        ValueError: names the setting.
    """
    share(user, alpha=alpha or 0.0)
    one_of(user, TEACHERS, teacher=teacher)
    one_of(user, MODES, teacher_mode=settings['teacher_mode'])
    interval, decay = settings['interval'], settings['ema_decay']
    if interval is not None and (type(interval) is not int or interval < 1):
        raise ValueError(f'{user}: interval must be a positive number of steps, got {interval}')
    if not 0 <= decay < 1:
        raise ValueError(f'{user}: ema_decay must lie in [0, 1), got {decay}')
    if settings['bank_dtype'] is not None:
        one_of(user, [*DTYPES, *DTYPES.values()], bank_dtype=settings['bank_dtype'])
    check_momentum(settings['bank_momentum'], settings['top_k'])
    idle = [] if teacher == 'auto' else without_effect(teacher, settings)
    if idle:
        raise ValueError(
            f'{user}: with teacher={teacher!r} {" and ".join(idle)} would do nothing: remove what is not for it, or '
            'choose another teacher'
        )


def without_effect(teacher: str, settings: Dict[str, Any]) -> List[str]:
    """Names of the settings that were given a value, and do nothing with this teacher."""
    return [name for name, value in settings.items() if name not in ACTS[teacher] and _is_set(name, value)]


def warn_without_effect(teacher: str, settings: Dict[str, Any]) -> None:
    """What ``teacher='auto'`` came to may have no use for a setting: that is said."""
    idle = [] if teacher == 'auto' else without_effect(teacher, settings)
    if idle:
        logger.warning("PSKD: %s: no effect with teacher='%s', which was taken", ', '.join(idle), teacher)


def _is_set(name: str, value: Any) -> bool:
    if name == 'bank_dtype':
        return value not in (None, 'float32', torch.float32)
    return value is not None and value != ONE_DEFAULT.get(name)


def dtype_of(name: Union[str, torch.dtype, None], default: str) -> torch.dtype:
    """The dtype that a name stands for, as ``'float16'``; torch's own are taken as they are."""
    return DTYPES.get(name or default, name)


def steps_of(
    data: Batches, alpha: Optional[float], interval: Optional[int], max_epochs: Optional[int], max_steps: Optional[int]
) -> Optional[int]:
    """How many steps the training takes, which ``data`` count from now on; None where epochs are counted.

    Raises:
        ValueError: the training ends before there is a past, or it is not known when it ends.
    """
    lengths = [length for length in (max_epochs, max_steps) if length is not None]
    if len(lengths) != 1 or not isinstance(lengths[0], int):
        raise ValueError(
            'PSKD: alpha grows up to the end of training: say when that is, by max_epochs= (loops over batches()) or '
            f'max_steps= (batches), got max_epochs={max_epochs} and max_steps={max_steps}'
        )
    first, unit, period_is, way_out = 1, 'epochs', 'a loop over batches()', 'raise max_epochs'
    if interval:
        if max_steps is None and length_of(data.loader) is None:
            raise ValueError('PSKD: interval= counts steps, and the loader has no length: give max_steps=')
        max_steps = max_steps or max_epochs * length_of(data.loader)
        first, unit, period_is, way_out = interval, 'steps', 'interval=', 'lower interval'
        data.steps_per_epoch = interval
    elif max_steps is not None:
        first, unit, period_is, way_out = data.count_steps('PSKD'), 'steps', 'a pass over the data', 'raise max_steps'
    else:
        data.check_epoch_ends('PSKD')
    if alpha != 0:
        total = max_epochs if max_steps is None else max_steps
        refuse_without_past('PSKD', first, total, unit, period_is=period_is, way_out=way_out)
    return max_steps
