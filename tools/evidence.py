"""Writes the tables of docs/evidence.md anew, from the measures of every run in docs/evidence/*.csv.

    python tools/evidence.py

A section bears the name of its file; the files are the runs.csv that reports leave (of tools/demo.py, and others).
"""

from pathlib import Path

from selfkd.benchmark import write_section
from selfkd.comparison import read_runs
from selfkd_mmpretrain.report import MEASURES, tables

DOCS = Path(__file__).resolve().parent.parent / 'docs'
COLUMNS = ('error %', 'NLL', 'ECE %', 'temperature', 'NLL with it', 'ECE % with it', 'AURC x1000')


def section(path: Path) -> str:
    """The tables of one file."""
    panels = read_runs(str(path))
    runs = [run for groups in panels.values() for runs in groups.values() for run in runs]
    columns = [title for title in COLUMNS if all(MEASURES[title][0] in run for run in runs)]
    return tables({f'**{title}**': groups for title, groups in panels.items()}, columns)


def main() -> None:
    for path in sorted((DOCS / 'evidence').glob('*.csv')):
        write_section(str(DOCS / 'evidence.md'), path.stem, section(path))
        print(f'{path.stem}: written')


if __name__ == '__main__':
    main()
