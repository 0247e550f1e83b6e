"""Files that survive: written beside their place and moved there, so that an interrupted write leaves the old one."""

import errno
import inspect
import os
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union

import torch

__all__ = ['check_whole', 'load', 'output_folder', 'replacing', 'save']

AnyPath = Union[str, 'os.PathLike[str]']


@contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """Gives the name of a new file beside ``path``; what the block wrote there takes the place of ``path`` at its end.

    A block that fails, or is interrupted, leaves ``path`` as it was. A link goes on pointing to where it did. What is
    no ordinary file (``/dev/null``) is written to directly.

    Raises:
        OSError: nothing can be written there, before the block runs.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), 'table.md')
        >>> with replacing(path) as beside:
        ...     _ = beside.write_text('whole')
        >>> path.read_text(), [file.name for file in path.parent.iterdir()]
        ('whole', ['table.md'])
    """
    place = Path(os.path.realpath(path))
    if place.exists():
        with open(place, 'ab'):  # fails for a folder, and for a file that must not be written to
            pass
        if not place.is_file():
            yield place
            return
    beside = place.with_name(f'.{place.stem}.{os.getpid()}{place.suffix}')  # some writers choose by the ending
    try:
        beside.touch()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    if place.exists():
        shutil.copymode(place, beside)
    try:
        yield beside
        with open(beside, 'rb+') as file:
            os.fsync(file.fileno())  # a full disk may be noticed here only
        os.replace(beside, place)
    finally:
        if beside.exists():
            beside.unlink()


def save(value: object, path: AnyPath) -> None:
    """``torch.save`` by way of [`replacing`][].

    Raises:
        OSError: the file cannot be written (a full disk); torch's own error does not say which file.
    """
    with replacing(path) as beside:
        try:
            torch.save(value, beside)
        except RuntimeError as error:
            raise OSError(f'{path}: could not be written: {str(error).splitlines()[0]}') from error


def load(path: AnyPath) -> object:
    """What ``torch.save`` wrote, onto the CPU. Load only files you trust: they are unpickled.

    Raises:
        OSError: the file is not there.
        ValueError: it is not whole, or was not written by ``torch.save``.
    """
    # torch below 1.13 has no such option, and above 2.5 it is on unless told otherwise.
    options = {'weights_only': False} if 'weights_only' in inspect.signature(torch.load).parameters else {}
    try:
        return torch.load(path, map_location='cpu', **options)
    except Exception as error:  # of a dozen kinds, by what is wrong with the file
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise ValueError(f'{path}: is no checkpoint, or not a whole one ({reason})') from error


def check_whole(path: AnyPath) -> None:
    """OSError where there is no such checkpoint, ValueError where it was cut. Nothing in it is loaded."""
    with open(path, 'rb') as file:
        start = file.read(2)
    if not start or start == b'PK' and not zipfile.is_zipfile(path):
        raise ValueError(f'{path}: is not a whole checkpoint, it was cut')


def output_folder(path: AnyPath) -> Path:
    """The folder, made where it is missing.

    Raises:
        OSError: it cannot be made, or nothing can be written in it.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return folder
