"""What the reports on finished runs share: finding the runs, and what stands in their configs."""

from pathlib import Path
from typing import Optional, Tuple

from mmengine.config import Config

__all__ = ['finished_run', 'seed_of']


def finished_run(work_dir: str, checkpoint: Optional[str] = None) -> Tuple[Config, str]:
    """The config of a finished run (the one ``*.py`` in its folder) and its checkpoint, by default the last one.

    Raises:
        FileNotFoundError: no config, several, or no checkpoint in ``work_dir``.
    """
    configs, pointer = sorted(Path(work_dir).glob('*.py')), Path(work_dir, 'last_checkpoint')
    if len(configs) != 1 or not (checkpoint or pointer.exists()):
        raise FileNotFoundError(
            f'{work_dir}: a finished run has one config (*.py) and last_checkpoint; found {len(configs)} configs, '
            f'last_checkpoint {"present" if pointer.exists() else "missing"}'
        )
    return Config.fromfile(configs[0]), checkpoint or pointer.read_text().strip()


def seed_of(cfg: Config) -> Optional[int]:
    """The seed that a config asks for, if it does: it says which runs of two methods make a pair."""
    return cfg.get('randomness', {}).get('seed')
