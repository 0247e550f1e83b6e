"""Trains a config of every family in a toolkit's own zoo, plain and with each method, and writes what came out.

    python tools/survey.py mmpretrain [FAMILY ...] [--write docs/support.md]

Needs no data and no GPU. Outcomes are kept as JSON, so that it can be interrupted and goes on where it was.

A config stays as it is but for what a small machine without data cannot have: its data are a few generated images, its
pre-trained weights and schedule are left out, and detectors train 32 regions of an image. It trains two steps, of an
epoch each, plain and with each method.
"""

import argparse
import copy
import datetime
import importlib.metadata
import json
import platform
import re
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, Sequence

import torch
from costs import write_section
from mmengine.config import Config
from survey_shrink import shrink

from selfkd.files import replacing
from selfkd_mmengine.trial import METHODS, classify, refusal, train

LEFT_OUT = ('benchmarks', 'deploy')
SMALL = ('atto', 'nano', 'tiny', 'x0-', '_xs', 'xxs', 'b0', '-s0', '050', 'r18', 'small', '_s_', '-s_', 'resnet18')
SMALL += ('r34', 'd20', '-t_', '_t_', 'a0', 'b1', '400mf', 'r50', 'resnet50', 'base', '-b_', 'p16', 'r101', 'large')
# Taken only if a family has no other.
UNUSUAL = ('headless', 'zeroshot', '_voc', '-g-', 'levir', '-XL_', 'dpool', '-rpn_r50', 'fast-rcnn', 'upernet_r18')


def families(toolkit: str, names: Sequence[str] = ()) -> Dict[str, str]:
    """A config of each family (or some) of the installed toolkit's zoo: the smallest by its name that has a model."""
    zoo, chosen = _zoo(toolkit), {}
    for folder in sorted(path for path in zoo.iterdir() if (path.name in names if names else path.name != '_base_')):
        paths = [path.relative_to(zoo) for path in folder.rglob('*.py')]
        paths = [path for path in paths if not any(part[0] == '_' or part in LEFT_OUT for part in path.parts)]
        for path in sorted(paths, key=_size):
            try:
                cfg = Config.fromfile(zoo / path)
            except Exception:  # some import what is not installed, or name files that are not there
                continue
            if {'type', 'backbone', 'detector', 'image_encoder'} & set(cfg.get('model') or ()):
                chosen[folder.name] = str(path)
                break
    return chosen


def _zoo(toolkit: str) -> Path:
    return Path(__import__(toolkit).__file__).parent / '.mim' / 'configs'


def _size(config: Path) -> tuple:
    name = config.name
    unusual = any(mark in name for mark in UNUSUAL)
    return unusual, next((i for i, mark in enumerate(SMALL) if mark in name), len(SMALL)), len(name), str(config)


def survey(toolkit: str, names: Sequence[str] = (), *, report: Callable = print) -> Dict[str, Dict[str, str]]:
    """Family -> ``config``, and the outcome of each method.

    Args:
        toolkit: ``'mmpretrain'``, ``'mmdet'`` or ``'mmseg'``; its plugin must be importable.
        names: some families only.
        report: is given a line for each family.
    """
    from mmengine.utils import import_modules_from_strings

    import_modules_from_strings([f'{toolkit}.models', f'{toolkit}.datasets', f'selfkd_{toolkit}'])
    rows = {}
    for family, name in families(toolkit, names).items():
        started = time.time()
        for scale in (1, 3):  # where plain training fails, again with larger images and clipped gradients
            rows[family] = {'config': name, **_outcomes(toolkit, name, scale)}
            if not any(outcome.startswith('toolkit') for outcome in rows[family].values()):
                break
        report(f'{family} ({time.time() - started:.0f} s): ' + json.dumps(rows[family]))
    return rows


def _outcomes(toolkit: str, name: str, scale: int) -> Dict[str, str]:
    """What became of a config with each method."""
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            cfg = shrink(Config.fromfile(_zoo(toolkit) / name, format_python_code=False), toolkit, folder, scale)
        except Exception as problem:  # a config that cannot even be read here
            return dict.fromkeys(METHODS[toolkit], f'toolkit: {type(problem).__name__}: {problem}')
        plain = None
        for method, options in METHODS[toolkit].items():
            switched = copy.deepcopy(cfg)
            switched.merge_from_dict(options)
            trained = train(switched)
            outcome = refusal(method, trained)
            if outcome is None:
                plain = plain or train(cfg)
                outcome = classify(method, plain, trained)
            outcomes[method] = re.sub(r'\s+', ' ', outcome)
    return outcomes


def table(rows: Dict[str, Dict[str, str]]) -> str:
    """Markdown: a row for each family, and below it the messages, numbered."""
    methods = [name for name in next(iter(rows.values())) if name != 'config']
    messages: Dict[str, int] = {}
    lines = ['| family | config | ' + ' | '.join(methods) + ' |', '| --- ' * (len(methods) + 2) + '|']
    for family, row in rows.items():
        cells = []
        for method in methods:
            kind, _, message = row[method].partition(': ')
            cells.append(f'{kind} [{messages.setdefault(row[method], len(messages) + 1)}]' if message else kind)
        lines.append(f'| {family} | `{Path(row["config"]).stem}` | ' + ' | '.join(cells) + ' |')
    lines += ['', '<details markdown="1">', f'<summary>The {len(messages)} messages</summary>', '']
    lines += [*(f'{number}. {_escape(message)}' for message, number in messages.items()), '', '</details>']
    return '\n'.join(lines)


def _escape(text: str) -> str:
    return re.sub(r'/\S*/', '', text)[:300].replace('<', '&lt;').replace('|', '\\|')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('toolkit', choices=list(METHODS))
    parser.add_argument('families', nargs='*', help='some families only (default: all)')
    parser.add_argument('--write', metavar='PAGE', help='Markdown page whose section named as the toolkit is replaced')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/survey'), help='where the outcomes are kept')
    parser.add_argument('--again', action='store_true', help='also families whose outcomes are there already')
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / f'{args.toolkit}.json'
    rows = json.loads(record.read_text()) if record.exists() else {}
    for family in families(args.toolkit, args.families):
        if family in rows and not args.again:
            continue
        rows.update(survey(args.toolkit, [family]))
        with replacing(record) as beside:
            beside.write_text(json.dumps(dict(sorted(rows.items())), indent=1))

    rows = dict(sorted(rows.items()))
    cells = [row[method] for row in rows.values() for method in METHODS[args.toolkit]]
    package = {'mmseg': 'mmsegmentation'}.get(args.toolkit, args.toolkit)
    text = (
        f'{datetime.date.today()}, {args.toolkit} {importlib.metadata.version(package)}, torch {torch.__version__}, '
        f'Python {platform.python_version()}. '
        f'{len(rows)} families, {len(cells)} trainings: '
        + ', '.join(f'{sum(c.startswith(kind) for c in cells)} {kind}' for kind in ('trains', 'refused', 'toolkit'))
        + f', {sum(c.startswith("DEFECT") for c in cells) or "no"} defect.\n\n'
        + table(rows)
    )
    print(text)
    if args.write:
        write_section(args.write, args.toolkit, text)


if __name__ == '__main__':
    main()
