"""PS-KD's options: what they may be, which teacher has them, and what ``teacher='auto'`` comes to."""

import logging
from typing import Any, Callable, Dict, List, Optional

from .checks import one_of, share
from .defaults import PSKD
from .storage import storage_name
from .teacher import MODES

__all__ = ['TEACHERS', 'check_momentum', 'check_options', 'choose_teacher', 'options_without_effect']
__all__ += ['refuse_without_past', 'warn_without_effect']

logger = logging.getLogger(__name__)

TEACHERS = ('auto', 'bank', 'snapshot', 'ema')
COPY = ('teacher_mode', 'interval', 'model', 'outputs')
OPTIONS = {  # that only some teachers have
    'bank': ('top_k', 'bank_dtype', 'bank_device', 'bank_momentum'),
    'snapshot': COPY,
    'ema': (*COPY, 'ema_decay'),
}


def check_options(user: str, task: str, options: Dict[str, Any]) -> None:
    """Refuses options that are out of range, and those that the teacher which was named has no use for.

    Args:
        user: what messages begin with.
        task: one of ``selfkd.defaults.TASKS``, whose defaults they have.
        options: by name, those that the plugin has.

    Raises:
        ValueError: names the option.
    """
    teacher, interval, decay = options['teacher'], options['interval'], options['ema_decay']
    share(user, alpha=options['alpha'])
    one_of(user, TEACHERS, teacher=teacher)
    one_of(user, MODES, teacher_mode=options['teacher_mode'])
    if interval is not None and (type(interval) is not int or interval < 1):
        raise ValueError(f'{user}: interval must be a positive number of steps, got {interval}')
    if not 0 <= decay < 1:
        raise ValueError(f'{user}: ema_decay must lie in [0, 1), got {decay}')
    check_momentum(options.get('bank_momentum', 0.0), options.get('top_k'), f'{user}: ')
    if options.get('bank_dtype') is not None:
        storage_name(f'{user}: bank_dtype', options['bank_dtype'])
    idle = [] if teacher == 'auto' else options_without_effect(teacher, task, options)
    if idle:
        raise ValueError(
            f'{user}: with teacher={teacher!r} {" and ".join(idle)} would do nothing: remove what is not for it, or '
            'choose another teacher'
        )


def check_momentum(momentum: float, top_k: Optional[int], user: str = '') -> None:
    """Refuses a bank's momentum that is out of range, or beside ``top_k``. ``user``: what messages begin with."""
    if not 0 <= momentum < 1:
        raise ValueError(f'{user}bank_momentum: must lie in [0, 1), got {momentum}')
    if momentum and top_k:
        raise ValueError(
            f'{user}bank_momentum={momentum} averages whole predictions, and with top_k={top_k} only a few classes of '
            'each are kept: remove one of the two'
        )


def options_without_effect(teacher: str, task: str, options: Dict[str, Any]) -> List[str]:
    """Names of options that are not at the task's default, though this teacher does not have them.

    Args:
        teacher: ``'bank'``, ``'snapshot'`` or ``'ema'``.
        task: one of ``selfkd.defaults.TASKS``.
        options: names and values; of those that all teachers have, too.

    Example:
        >>> options_without_effect('snapshot', 'classification', dict(alpha=0.8, interval=50, top_k=16))
        ['top_k']
    """
    foreign = {name for names in OPTIONS.values() for name in names}.difference(OPTIONS[teacher])
    defaults = {name: default.get(task) if isinstance(default, dict) else default for name, default in PSKD.items()}
    return [name for name, value in options.items() if name in foreign and value not in (None, defaults.get(name))]


def choose_teacher(teacher: str, obstacle: Optional[str], *, log: Callable[[str], None] = logger.info) -> str:
    """What ``teacher='auto'`` comes to, and says so in the log: the bank, or the snapshot if it cannot be.

    Args:
        teacher: the setting; anything but ``'auto'`` is taken as it is.
        obstacle: why a prediction would belong to no single sample, as ``'Mixup mixes samples'``; None: it does belong.
        log: writes into the toolkit's log.
    """
    if teacher != 'auto':
        return teacher
    if obstacle is None:
        log("PS-KD: teacher='auto' takes the bank: each sample keeps its identity")
        return 'bank'
    log(f"PS-KD: teacher='auto' takes the snapshot: {obstacle}")
    return 'snapshot'


def warn_without_effect(
    user: str, teacher: str, task: str, options: Dict[str, Any], *, log: Callable[[str], None] = logger.warning
) -> None:
    """Says which options have no effect with the teacher that ``'auto'`` came to; arguments as above."""
    idle = options_without_effect(teacher, task, options)
    if idle:
        log(f'{user}: {", ".join(idle)}: no effect with teacher={teacher!r}, which was taken')


def refuse_without_past(
    user: str, period: float, total: float, unit: str, *, period_is: str, way_out: str, alpha: str = 'alpha=0'
) -> None:
    """Refuses a training that ends before there is a past to learn from.

    Args:
        user: what the message begins with.
        period: how long the first period is.
        total: how long training is.
        unit: of both, as ``'iterations'``.
        period_is: what the period is, as ``'one pass over the training set'``.
        way_out: what to change, as ``'raise max_iters'``.
        alpha: the setting that switches the method off.

    Raises:
        ValueError: with all of these.
    """
    if period >= total:
        first = f'first {period} {unit} ({period_is}) have' if period != 1 else f'first of the {unit} has'
        raise ValueError(
            f'{user}: the {first} no past, and training ends after {total}, so it would be plain: {way_out}, or set '
            f'{alpha} if plain is what you want'
        )
