"""What the reports on finished runs share: finding the runs, and what stands in their configs."""

from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from mmengine.config import Config

from selfkd.comparison import check_seeds
from selfkd.files import load

from .configs import load_config

__all__ = ['check_runs', 'finished_run', 'seed_of']


def finished_run(work_dir: str, checkpoint: Optional[str] = None) -> Tuple[Config, str]:
    """The config of a finished run (the one ``*.py`` in its folder) and its checkpoint, by default the last one.

    Raises:
        FileNotFoundError: no config, several, or no checkpoint in ``work_dir``.
        ValueError: a config that cannot be read.
    """
    configs, pointer = sorted(Path(work_dir).glob('*.py')), Path(work_dir, 'last_checkpoint')
    named = pointer.read_text().strip() if pointer.exists() else ''  # empty, if the run was killed at the wrong time
    if len(configs) != 1 or not (checkpoint or named):
        raise FileNotFoundError(
            f'{work_dir}: a finished run has one config (*.py) and last_checkpoint; found {len(configs)} configs, '
            f'last_checkpoint {"present" if named else "empty" if pointer.exists() else "missing"}'
        )
    checkpoint = checkpoint or named
    if not Path(checkpoint).is_file() and '://' not in checkpoint:
        raise FileNotFoundError(f'{work_dir}: its checkpoint is not there any more: {checkpoint}')
    return load_config(str(configs[0])), checkpoint


def check_runs(groups: Mapping[str, Sequence[str]]) -> None:
    """Looks at all runs of a report, by name, before the first is tested: what would end it in the middle.

    Raises:
        FileNotFoundError: no config, several, or no checkpoint in one of the work dirs.
        ValueError: a config or checkpoint that cannot be read, or two runs of a group with the same seed.
    """
    seeds: Dict[str, List[Dict[str, float]]] = {}
    for name, folders in groups.items():
        for cfg, checkpoint in map(finished_run, folders):
            load(checkpoint)
            seed = seed_of(cfg)
            seeds.setdefault(name, []).append({} if seed is None else {'seed': seed})
    check_seeds(seeds)


def seed_of(cfg: Config) -> Optional[int]:
    """The seed that a config asks for, if it does: it says which runs of two methods make a pair."""
    return cfg.get('randomness', {}).get('seed')
