"""Range checks of the methods' settings, for the plugins' constructors: a wrong one is refused before training."""

from typing import Sequence

__all__ = ['at_least_zero', 'one_of', 'positive', 'share']


def at_least_zero(user: str, **settings: float) -> None:
    """Refuses a setting below zero (or not a number).

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
    for name, value in settings.items():
        if not value >= 0:
            raise ValueError(f'{user}: {name} must be at least 0, got {value}')


def positive(user: str, **settings: float) -> None:
    """As :func:`at_least_zero`, and refuses zero."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f'{user}: {name} must be above 0, got {value}')


def share(user: str, **settings: float) -> None:
    """As :func:`at_least_zero`, and refuses what is above one."""
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{user}: {name} must lie in [0, 1], got {value}')


def one_of(user: str, allowed: Sequence[object], **settings: object) -> None:
    """Refuses a setting that is none of the allowed values."""
    for name, value in settings.items():
        if value not in allowed:
            raise ValueError(f'{user}: {name} must be one of {list(allowed)}, got {value!r}')
