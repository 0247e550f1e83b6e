"""Trains a config of every family in a toolkit's own zoo, plain and with each method, and writes what came out.

    python tools/survey.py mmpretrain [FAMILY ...] [--write docs/support.md]

Needs no data and no GPU. Outcomes are kept as JSON, so that it can be interrupted and goes on where it was.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
from pathlib import Path

import torch

from selfkd.benchmark import write_section
from selfkd_mmengine.survey import METHODS, families, survey, table

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
    record.write_text(json.dumps(dict(sorted(rows.items())), indent=1))

rows = dict(sorted(rows.items()))
cells = [row[method] for row in rows.values() for method in METHODS[args.toolkit]]
versions = ', '.join(
    f'{name} {importlib.metadata.version(package)}'
    for name, package in {args.toolkit: {'mmseg': 'mmsegmentation'}.get(args.toolkit, args.toolkit)}.items()
)
text = (
    f'{datetime.date.today()}, {versions}, torch {torch.__version__}, Python {platform.python_version()}. '
    f'{len(rows)} families, {len(cells)} trainings: '
    + ', '.join(f'{sum(c.startswith(kind) for c in cells)} {kind}' for kind in ('trains', 'refused', 'toolkit'))
    + f', {sum(c.startswith("DEFECT") for c in cells) or "no"} defect.\n\n'
    + table(rows)
)
print(text)
if args.write:
    write_section(args.write, args.toolkit, text)
