"""A large bank in a file of its own beside the checkpoints, so that not each of them holds it."""

import secrets
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from .files import load, save

__all__ = ['LARGE', 'SideFile']

LARGE = 10**9  # bytes of a bank from which on it is kept in a file of its own


class SideFile:
    """Where the checkpoints of a run keep a large bank: the two newest of them, in two files that take turns.

    A run that was killed before its checkpoint was written still has the bank of the checkpoint before.

    Attributes:
        place: the folder of the checkpoint that is about to be written or was read, and what its step is called; None
            where no folder is known: the bank is then part of the state.

    Example:
        >>> import tempfile
        >>> side, folder = SideFile(), tempfile.mkdtemp()
        >>> side.place = folder, 'epoch 1'
        >>> kept = side.save({'values': 1})
        >>> Path(kept['file']).name, kept['step']
        ('selfkd_bank_1.pth', 'epoch 1')
        >>> side.load(kept)
        {'values': 1}
    """

    def __init__(self) -> None:
        self.place: Optional[Tuple[str, str]] = None
        self.run = secrets.token_hex(8)  # another run's file has the same name, and maybe the same step
        self._last: Dict[str, Any] = {}

    def save(self, state: Dict[str, Any]) -> Dict[str, Any]:
        """Writes a bank's state; returns what stands for it in the checkpoint. A step is written once."""
        assert self.place is not None
        folder, step = Path(self.place[0]).resolve(), self.place[1]
        assert step, 'the place that was read is not one to write to'
        last = Path(self._last.get('file', ''))
        if (self._last.get('step'), self._last.get('run'), last.parent) == (step, self.run, folder):
            return self._last
        number = 2 if last == folder / _name(1) else 1
        kept = {'file': str(folder / _name(number)), 'step': step, 'run': self.run}
        save({**kept, 'bank': state}, kept['file'])
        self._last = kept
        return kept

    def load(self, kept: Dict[str, Any]) -> Dict[str, Any]:
        """The state that ``save`` wrote, from beside the checkpoint, or from where it was saved.

        Raises:
            ValueError: the file holds the bank of another step or run, or is not there.
        """
        saved = Path(kept['file'])
        holds = 'is not there'
        for path in dict.fromkeys([Path(self.place[0], saved.name).resolve() if self.place else saved, saved]):
            if path.exists():
                found: Any = load(path)
                if (found['step'], found['run']) == (kept['step'], kept['run']):
                    self._last = {**kept, 'file': str(path)}
                    return found['bank']
                other = '' if found['run'] == kept['run'] else ' of another run'
                saved, holds = path, f'holds that of {found["step"]}{other}'
        raise ValueError(
            f'PS-KD: the checkpoint is of {kept["step"]}, and its bank was saved beside it, in {saved.name}, but '
            f'{saved} {holds}. Only the two newest checkpoints have their bank: resume from one of them, with the file '
            'beside it, or load the weights without resuming'
        )


def _name(number: int) -> str:
    return f'selfkd_bank_{number}.pth'
