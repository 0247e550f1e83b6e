"""Finished runs side by side by what their toolkit logged in its last evaluation."""

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from .cli import command_parser, refusing
from .comparison import Column, Run, comparison_table, note, write_runs
from .files import output_folder, replacing

__all__ = ['columns_of', 'logged_measures', 'parse_groups', 'shared_measures', 'write_table']

PRECISION = r'((bbox|segm)_)?m?ap(\d*|[sml]|_\w{1,2}|-.+)'  # with the IoU, the size or the class that it is for
HIGHER = re.compile(rf'{PRECISION}|acc|m?iou|ar|recall|precision|dice|auroc|bleu|chrf|f1|top\d')
LOWER = re.compile(r'ece|nll|nll_loss|loss|error|brier|aurc|eaurc|fpr95|ppl')
DETECTRON2 = ('bbox/', 'segm/', 'keypoints/', 'sem_seg/', 'panoptic_seg/', 'calibration/')  # what evaluators log
NO_MEASURES = {'step', 'iteration', 'iter', 'epoch', 'time', 'data_time', 'memory'}  # of the toolkits' lines


def logged_measures(work_dir: str) -> Dict[str, float]:
    """What a run's last evaluation measured, by the toolkit's own names, and ``seed`` if the run's config has one.

    Reads ``*/vis_data/scalars.json`` of MMPretrain, MMDetection and MMSegmentation (of a resumed run the newest with
    an evaluation in it), or ``metrics.json`` of Detectron2. Measures that are not numbers (NaN) are left out, and so is
    a line that a killed run left half written; a word on stderr says so.

    Raises:
        OSError: no such log in ``work_dir``, or no evaluation in it.
        ValueError: a log or config that is not what the toolkits write.
    """
    return _measures(*_last_evaluation(Path(work_dir)))


def _measures(line: dict, log: Path) -> Dict[str, float]:
    return {**{key: value for key, value in line.items() if key not in NO_MEASURES and value == value}, **_seed(log)}


def _last_evaluation(folder: Path) -> Tuple[dict, Path]:
    """The line of the log, and the log."""
    detectron2 = folder / 'metrics.json'
    logs = [detectron2] if detectron2.exists() else sorted(folder.glob('*/vis_data/scalars.json'), reverse=True)
    for log in logs:
        lines = _lines(log)
        if log == detectron2:  # writes what training and evaluation measured into one line
            lines = [
                {key: line[key] for key in line if key == 'iteration' or key.startswith(DETECTRON2)} for line in lines
            ]
        evaluations = [line for line in lines if 'lr' not in line and set(line) - NO_MEASURES]
        if evaluations:
            return evaluations[-1], log
    raise FileNotFoundError(
        f'{folder}: no evaluation in */vis_data/scalars.json (OpenMMLab) or metrics.json (Detectron2)'
    )


def _lines(log: Path) -> List[dict]:
    """The log's lines. A killed run leaves half a line, and a resumed one may go on writing behind it."""
    lines, broken = [], []
    for number, text in enumerate(_text(log).splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            broken.append(number)
    if broken and not lines:
        raise ValueError(f'{log}: is no log with a JSON object in each line')
    if broken:
        numbers = ', '.join(map(str, broken))
        print(f'{log}: left out what is not a whole line (a run that was killed?): line {numbers}', file=sys.stderr)
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: is not a text ({error})') from error


def _seed(log: Path) -> Dict[str, float]:
    """Of the config that the toolkit left beside the log: it says which runs of two methods make a pair."""
    yaml, config = log.with_name('config.yaml'), log.with_name('config.py')
    if yaml.exists():
        found = re.search(r'^SEED: (\d+)$', _text(yaml), re.MULTILINE)
        return {'seed': int(found[1])} if found else {}
    try:
        nodes = ast.parse(_text(config)).body if config.exists() else []
    except SyntaxError as error:
        raise ValueError(f'{config}: is no config, or not a whole one ({error})') from error
    for node in nodes:  # randomness = dict(seed=0, ...)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) == 'randomness':
            options = {option.arg: option.value for option in getattr(node.value, 'keywords', ())}
            seed = getattr(options.get('seed'), 'value', None)  # of a constant
            return {} if seed is None else {'seed': seed}
    return {}


def _note_lengths(last: Dict[str, dict]) -> None:
    """A word on stderr where not all runs were evaluated after as much training: one may be unfinished."""
    ends: Dict[object, List[str]] = {}
    for folder, line in last.items():
        ends.setdefault(line.get('step', line.get('iteration')), []).append(folder)  # mmengine's, Detectron2's
    if len(ends) > 1:
        found = '; '.join(f'{end}: {", ".join(runs)}' for end, runs in ends.items())
        print(f'not all runs are trained as long: the last evaluation was at step or epoch {found}', file=sys.stderr)


def columns_of(measures: Sequence[str]) -> Dict[str, Column]:
    """Columns for measures by their names' last part; one that is not known is shown, but not called better or worse.

    Example:
        >>> columns = columns_of(['mIoU', 'calibration/ece', 'calibration/detections'])
        >>> [(name, column.better) for name, column in columns.items()]
        [('mIoU', 'higher'), ('calibration/ece', 'lower'), ('calibration/detections', None)]
    """
    columns = {}
    for key in measures:
        name = key.split('/')[-1].lower()
        better: Optional[str] = 'higher' if HIGHER.fullmatch(name) else 'lower' if LOWER.fullmatch(name) else None
        columns[key] = Column(key, 1, 3, better)
    return columns


def shared_measures(groups: Dict[str, List[Run]]) -> List[str]:
    """The measures that all runs have, without their seeds."""
    everything = [run for runs in groups.values() for run in runs]
    return [key for key in everything[0] if key != 'seed' and all(key in run for run in everything)]


def main(arguments: Sequence[str]) -> None:
    """Compares finished runs of MMPretrain, MMDetection, MMSegmentation or Detectron2 by their last logged evaluation.

        selfkd compare OUT NAME=WORK_DIR[,WORK_DIR...] [NAME=...] [--measures NAME ...]

        selfkd compare work_dirs/table plain=work_dirs/plain_0,work_dirs/plain_1 PS-KD=work_dirs/pskd_0,work_dirs/pskd_1

    Nothing is tested anew. Runs given under one name are averaged (seeds), and compared with those of the first name,
    seed by seed. Where some were evaluated after more training than others, a line on stderr says which.
    """
    parser = command_parser('compare', main.__doc__)
    parser.add_argument('out', help='folder for table.md and runs.csv')
    parser.add_argument('--measures', nargs='+', metavar='NAME', help='which (default: all that every run has)')
    args, folders = parse_groups(parser, arguments)
    with refusing(parser, ModuleNotFoundError):
        last = {folder: _last_evaluation(Path(folder)) for runs in folders.values() for folder in runs}
        groups = {name: [_measures(*last[folder]) for folder in runs] for name, runs in folders.items()}
        shared = shared_measures(groups)
        unknown = set(args.measures or ()) - set(shared)
        if unknown or not shared:
            raise ValueError(f'--measures: not every run has {sorted(unknown)}; they all have {shared}')
        print(f'{write_table(args.out, groups, columns_of(args.measures or shared))}\n\nwrote {args.out}')
    _note_lengths({folder: line for folder, (line, _) in last.items()})
    others = sorted({key for runs in groups.values() for run in runs for key in run} - {*shared, 'seed'})
    if others and not args.measures:
        print(f'left out, as not every run has a number for it: {", ".join(others)}', file=sys.stderr)


def parse_groups(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> Tuple[argparse.Namespace, Dict[str, List[str]]]:
    """The arguments of a report, and the work dirs by name that its last ones, ``NAME=WORK_DIR[,WORK_DIR...]``, say.

    A name given twice has the runs of both. ``out`` among the arguments becomes a folder, so that a report does not
    fail at its end.

    Example:
        >>> parse_groups(argparse.ArgumentParser(), ['plain=a,b', 'PS-KD=c', 'plain=d'])[1]
        {'plain': ['a', 'b', 'd'], 'PS-KD': ['c']}
    """
    form = 'NAME=WORK_DIR[,WORK_DIR...]'
    parser.add_argument('groups', nargs='+', metavar=form)
    args = parser.parse_args(arguments)
    groups: Dict[str, List[str]] = {}
    for argument in args.groups:
        name, equals, folders = argument.partition('=')
        found = groups.setdefault(name, [])
        found += folders.split(',')
        if not equals or not all([name, *found]):
            parser.error(f'{argument!r}: must be {form}')
        places = [Path(folder).resolve() for folder in found]
        if len(set(places)) < len(places):
            parser.error(f'{argument!r}: a run counts once in {name}, and one is named twice')
    with refusing(parser):
        if hasattr(args, 'out'):
            output_folder(args.out)
    return args, groups


def write_table(out: str, groups: Dict[str, List[Run]], columns: Dict[str, Column]) -> str:
    """Writes ``table.md``, how to read it included, and every run's measures, ``runs.csv``; returns the table.

    Raises:
        OSError: they cannot be written.
        ValueError: two runs of a group have the same seed.
    """
    text = comparison_table(groups, columns)
    text = f'{text}\n\n{note(groups)}' if len(groups) > 1 else text
    folder = output_folder(out)
    with replacing(folder / 'table.md') as beside:
        beside.write_text(text + '\n', encoding='utf-8')
    write_runs(str(folder / 'runs.csv'), {'': groups})
    return text
