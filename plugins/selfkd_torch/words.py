"""What a method has to say, in the words of the toolkit that it is used in."""

import re
from contextlib import contextmanager
from typing import Dict

__all__ = ['in_words']


@contextmanager
def in_words(words: Dict[str, str]):
    """Errors that are raised inside have the names that settings have in a toolkit.

    Args:
        words: patterns of what ``selfkd_torch`` calls them, and what they are called there.

    Example:
        >>> with in_words({r'\\bteacher=': 'pskd_teacher='}):
        ...     raise ValueError("use teacher='snapshot'")
        Traceback (most recent call last):
        ValueError: use pskd_teacher='snapshot'
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        said = str(error)
        for theirs, ours in words.items():
            said = re.sub(theirs, ours, said)
        if said == str(error):
            raise
        raise type(error)(said) from error
