"""What the reports on finished runs share: finding the runs, and the table that compares them."""

import statistics
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from mmengine.config import Config

__all__ = ['comparison_table', 'finished_run', 'run_groups']


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


def run_groups(arguments: Sequence[str]) -> Dict[str, List[str]]:
    """Work dirs by name, from ``NAME=WORK_DIR[,WORK_DIR...]``.

    Example:
        >>> run_groups(['plain=a,b', 'PS-KD=c'])
        {'plain': ['a', 'b'], 'PS-KD': ['c']}
    """
    groups = {}
    for argument in arguments:
        name, equals, folders = argument.partition('=')
        if not equals:
            raise ValueError(f'{argument!r}: must be NAME=WORK_DIR[,WORK_DIR...]')
        groups[name] = folders.split(',')
    return groups


def comparison_table(groups: Dict[str, List[Dict[str, float]]], columns: Dict[str, Tuple[str, float, int]]) -> str:
    """A Markdown table: a row for each group of runs, mean and (from two runs on) standard deviation.

    Args:
        groups: name -> the measures of each of its runs.
        columns: title -> the measure's key, a factor, and the number of decimals.

    Example:
        >>> print(comparison_table({'plain': [{'acc': 0.5}, {'acc': 0.7}]}, {'accuracy %': ('acc', 100, 1)}))
        |       | runs | accuracy %  |
        | ----- | ---- | ----------- |
        | plain | 2    | 60.0 ± 14.1 |
    """
    rows = [['', 'runs', *columns]]
    for name, runs in groups.items():
        cells = []
        for key, factor, decimals in columns.values():
            values = [run[key] * factor for run in runs]
            spread = f' ± {statistics.stdev(values):.{decimals}f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.{decimals}f}{spread}')
        rows.append([name, str(len(runs)), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in rows]
    lines.insert(1, '| ' + ' | '.join('-' * width for width in widths) + ' |')
    return '\n'.join(lines)
