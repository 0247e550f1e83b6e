"""Old names of options: they work for one minor version, with a warning that says the new one."""

import functools
import logging
import warnings
from typing import Callable

__all__ = ['renamed', 'warn_renamed']


logger = logging.getLogger(__name__)


def warn_renamed(user: str, old: str, new: str, stacklevel: int = 3) -> None:
    """Warns of an option's old name: in the log, and as a DeprecationWarning, which Python hides by default."""
    message = f'{user}: {old} is now called {new}'
    logger.warning(message)
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def renamed(**names: str) -> Callable:
    """Decorates a constructor: lets options be given by their old names, with a DeprecationWarning.

    Args:
        names: ``old='new'``.

    Raises:
        TypeError: both names of an option were given.

    Example:
        >>> class Hook:
        ...     @renamed(dtype='bank_dtype')
        ...     def __init__(self, bank_dtype='float32'):
        ...         self.bank_dtype = bank_dtype
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter('always')
        ...     hook = Hook(dtype='float16')
        >>> hook.bank_dtype, str(caught[0].message)
        ('float16', 'Hook: dtype is now called bank_dtype')
    """

    def decorate(init: Callable) -> Callable:
        @functools.wraps(init)
        def with_old_names(self, *args, **options):
            for old in [name for name in names if name in options]:
                warn_renamed(type(self).__name__, old, names[old])
                if names[old] in options:
                    raise TypeError(f'{type(self).__name__}: {old} and {names[old]} are one option: remove {old}')
                options[names[old]] = options.pop(old)
            init(self, *args, **options)

        return with_old_names

    return decorate
