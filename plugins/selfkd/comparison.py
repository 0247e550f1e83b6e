"""Runs of several methods side by side: means, and by how much each method differs from plain training.

A difference is taken seed by seed, with the 95 % interval of its mean; whether it is called better or worse follows
from that interval. Needs SciPy (``pip install selfkd[metrics]``).
"""

import csv
import math
import statistics
import warnings
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from .files import replacing

__all__ = [
    'NOTE',
    'Column',
    'Difference',
    'check_seeds',
    'comparison_table',
    'differences',
    'note',
    'paired_difference',
    'read_runs',
    'verdict',
    'write_runs',
]

Run = Dict[str, float]
BY_SEED, BY_ORDER = 'with the same seed', 'in the order given, as not every run has a seed'
NOTE = (  # what stands below such tables
    f'[...]: 95 % interval of the mean difference over the pairs of runs {BY_SEED} (paired t). Each interval stands '
    'for itself: at 95 %, about 1 in 20 comparisons looks significant by chance.'
)


class Column(NamedTuple):
    """A measure in a table.

    Attributes:
        key: of a run's measures.
        factor: from the measure's natural unit to the table's.
        decimals: shown.
        better: 'lower', 'higher', or None for a number that is neither good nor bad.
    """

    key: str
    factor: float
    decimals: int
    better: Optional[str] = 'lower'


class Difference(NamedTuple):
    """Mean of the differences between paired runs, and the ends of its interval (None for a single pair)."""

    mean: float
    low: Optional[float]
    high: Optional[float]
    pairs: int


def paired_difference(runs: Sequence[float], plain: Sequence[float], *, confidence: float = 0.95) -> Difference:
    r"""Mean of runs - plain over the pairs, with its Student-t interval :math:`\bar d \pm t_{n-1} s / \sqrt{n}`.

    Example:
        >>> difference = paired_difference([1.0, 2.0, 4.0], [2.0, 4.0, 5.0])
        >>> [round(value, 2) for value in difference]
        [-1.33, -2.77, 0.1, 3]

    Raises:
        ValueError: no pairs, or not as many of the one as of the other.
    """
    try:
        from scipy.stats import ttest_rel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("comparing runs needs SciPy 1.10: pip install 'selfkd[metrics]'") from error

    if not runs or len(runs) != len(plain):
        raise ValueError(f'runs, plain: must be pairs, got {len(runs)} and {len(plain)} values')
    mean, pairs = statistics.fmean(a - b for a, b in zip(runs, plain)), len(runs)
    if pairs == 1:
        return Difference(mean, None, None, pairs)
    with warnings.catch_warnings():  # of differences that are all alike: their interval is a point
        warnings.simplefilter('ignore', RuntimeWarning)
        low, high = ttest_rel(runs, plain).confidence_interval(confidence)
    return Difference(mean, float(low), float(high), pairs)


def _stdev(values: Sequence[float]) -> float:
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def verdict(difference: Difference, better: str) -> str:
    """'better' or 'worse' where the whole interval lies on one side of 0, else 'no clear difference'.

    Of a mean or an interval that is not a number, or infinite, nothing can be said.

    Args:
        better: 'lower' or 'higher', which values are the good ones.

    Example:
        >>> verdict(paired_difference([1.0, 2.0, 4.0], [2.0, 4.0, 5.0]), 'lower')
        'no clear difference'
        >>> verdict(paired_difference([1.0, 2.0, 4.0], [3.0, 4.0, 6.1]), 'lower')
        'better'
        >>> verdict(paired_difference([1.0], [3.0]), 'lower')
        'one pair, no interval'
        >>> verdict(paired_difference([1.0, float('nan')], [3.0, 4.0]), 'lower')
        'no verdict, not a number'
    """
    if better not in ('lower', 'higher'):
        raise ValueError(f"better: must be 'lower' or 'higher', got {better!r}")
    if not all(math.isfinite(value) for value in difference if value is not None):
        return 'no verdict, not a number'
    if difference.low is None or difference.high is None:
        return 'one pair, no interval'
    if difference.low <= 0 <= difference.high:
        return 'no clear difference'
    return 'better' if (difference.mean < 0) == (better == 'lower') else 'worse'


def comparison_table(groups: Dict[str, List[Run]], columns: Dict[str, Column]) -> str:
    """Markdown: a row for each group of runs (mean, standard deviation), and one for its difference to the first.

    Args:
        groups: name -> the measures of each of its runs; ``seed`` among them says which runs of two groups make a
            pair. Where a run has none, those of two groups as large make pairs in the order given.
        columns: title -> which measure, and how it is shown; fields of [`Column`][].

    Example:
        >>> plain, other = [{'acc': 0.5}, {'acc': 0.7}], [{'acc': 0.5}, {'acc': 0.8}]
        >>> text = comparison_table({'plain': plain, 'PS-KD': other}, {'accuracy %': ('acc', 100, 1, 'higher')})
        >>> print(text)
        |       | runs | accuracy %  |
        | ----- | ---- | ----------- |
        | plain | 2    | 60.0 ± 14.1 |
        | PS-KD | 2    | 65.0 ± 21.2 |
        <BLANKLINE>
        | minus plain | pairs | accuracy %                              |
        | ----------- | ----- | --------------------------------------- |
        | PS-KD       | 2     | +5.0 [-58.5, +68.5] no clear difference |

    Raises:
        ValueError: two runs of a group have the same seed.
    """
    shown = {title: Column(*column) for title, column in columns.items()}
    rows = [['', 'runs', *shown]]
    for name, runs in groups.items():
        rows.append([name, str(len(runs)), *(_mean([run[c.key] for run in runs], c) for c in shown.values())])
    found = differences(groups, columns)
    if not found:
        return _markdown(rows)
    shown = {title: column for title, column in shown.items() if column.better}
    against = [[f'minus {next(iter(groups))}', 'pairs', *shown]]
    for name, measured in found.items():
        cells = [_difference(measured[title], column) if measured else 'no pairs' for title, column in shown.items()]
        against.append([name, str(max((one.pairs for one in measured.values()), default=0)), *cells])
    return f'{_markdown(rows)}\n\n{_markdown(against)}'


def differences(groups: Dict[str, List[Run]], columns: Dict[str, Column]) -> Dict[str, Dict[str, Difference]]:
    """What [`comparison_table`][] says of each group but the first, as numbers: name -> title -> difference.

    Measures that are neither good nor bad are left out; a group without pairs has none.

    Example:
        >>> plain, other = [{'acc': 0.5}, {'acc': 0.7}], [{'acc': 0.5}, {'acc': 0.8}]
        >>> found = differences({'plain': plain, 'PS-KD': other}, {'accuracy %': ('acc', 100, 1, 'higher')})
        >>> round(found['PS-KD']['accuracy %'].mean, 6)
        5.0
    """
    shown = {title: column for title, column in ((t, Column(*c)) for t, c in columns.items()) if column.better}
    (_, plain), *others = groups.items()
    return {
        name: {title: _scaled_difference(pairs, column) for title, column in shown.items()} if pairs else {}
        for name, pairs in ((name, _pairs(name, runs, plain)) for name, runs in others)
    }


def note(*panels: Dict[str, List[Run]]) -> str:
    """``NOTE``, which stands below tables of groups of runs, with how those runs were paired.

    Example:
        >>> seeded, unseeded = [{'seed': 0}, {'seed': 1}], [{}, {}]
        >>> note({'plain': seeded, 'PS-KD': seeded}) == NOTE
        True
        >>> for plain, other in ((unseeded, seeded), (seeded, unseeded)):
        ...     text = note({'plain': plain, 'PS-KD': seeded, 'CS-KD': other})
        ...     print(text[text.index('runs') : text.index(' (paired t)')])
        runs in the order given, as not every run has a seed
        runs with the same seed (CS-KD: in the order given, as not every run has a seed)
    """
    others: Dict[str, List[Run]] = {}
    for groups in panels:
        (_, plain), *rest = groups.items()
        for name, runs in rest:
            others.setdefault(name, []).extend([*runs, *plain])
    by_order = [name for name, runs in others.items() if any('seed' not in run for run in runs)]
    if not by_order:
        return NOTE
    how = BY_ORDER if len(by_order) == len(others) else f'{BY_SEED} ({", ".join(by_order)}: {BY_ORDER})'
    return NOTE.replace(BY_SEED, how)


def check_seeds(groups: Dict[str, List[Run]]) -> None:
    """ValueError where runs would be compared seed by seed, and several of a group have the same one."""
    (_, plain), *others = groups.items()
    for name, runs in others:
        _pairs(name, runs, plain)


def _pairs(name: str, runs: List[Run], plain: List[Run]) -> List[Tuple[Run, Run]]:
    if any('seed' not in run for run in [*runs, *plain]):
        return list(zip(runs, plain)) if len(runs) == len(plain) else []
    for group in (runs, plain):
        seeds = [run['seed'] for run in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f'{name}: runs are compared seed by seed, and several have the same one: {seeds}')
    of_seed = {run['seed']: run for run in plain}
    return [(run, of_seed[run['seed']]) for run in runs if run['seed'] in of_seed]


def _mean(values: List[float], column: Column) -> str:
    values = [value * column.factor for value in values]
    spread = f' ± {_stdev(values):.{column.decimals}f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.{column.decimals}f}{spread}'


def _scaled_difference(pairs: List[Tuple[Run, Run]], column: Column) -> Difference:
    runs, plain = ([run[column.key] * column.factor for run in side] for side in zip(*pairs))
    return paired_difference(runs, plain)


def _difference(found: Difference, column: Column) -> str:
    ends = (found.low, found.high)
    interval = '' if None in ends else f' [{", ".join(f"{end:+.{column.decimals}f}" for end in ends)}]'
    return f'{found.mean:+.{column.decimals}f}{interval} {verdict(found, str(column.better))}'


def _markdown(rows: List[List[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in rows]
    lines.insert(1, '| ' + ' | '.join('-' * width for width in widths) + ' |')
    return '\n'.join(lines)


def write_runs(path: str, panels: Dict[str, Dict[str, List[Run]]]) -> None:
    """Writes the measures that all runs have as CSV, a line a run, to six significant digits.

    Args:
        panels: panel title -> group name -> runs; they are the first two columns.
    """
    everything = [run for groups in panels.values() for runs in groups.values() for run in runs]
    keys = [key for key in everything[0] if all(key in run for run in everything)]
    with replacing(path) as beside, open(beside, 'w', newline='', encoding='utf-8') as file:
        lines = csv.writer(file, lineterminator='\n')
        lines.writerow(['panel', 'group', *keys])
        for panel, groups in panels.items():
            for group, runs in groups.items():
                lines.writerows([panel, group, *(f'{run[key]:.6g}' for key in keys)] for run in runs)


def read_runs(path: str) -> Dict[str, Dict[str, List[Run]]]:
    """What [`write_runs`][] wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another one, or was cut.
    """
    panels: Dict[str, Dict[str, List[Run]]] = {}
    with open(path, newline='', encoding='utf-8') as file:
        for line in csv.DictReader(file):
            try:
                runs = panels.setdefault(line.pop('panel'), {}).setdefault(line.pop('group'), [])
                runs.append({key: float(value) for key, value in line.items()})
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f'{path}: is no table of runs, or not a whole one ({error!r})') from error
    return panels
