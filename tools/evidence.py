"""Writes the tables of docs/evidence.md anew, from the measures of every run in docs/evidence/*.csv.

    python tools/evidence.py

The files are the runs.csv that reports leave (`selfkd compare`, `selfkd report-translation`, tools/demo.py).
SECTION.csv makes the section of that name; several SECTION.PANEL.csv make one with a table for each.
"""

from pathlib import Path
from typing import Dict

from selfkd.benchmark import write_section
from selfkd.comparison import NOTE, comparison_table, read_runs

DOCS = Path(__file__).resolve().parent.parent / 'docs'
CLASSIFICATION = {
    'error %': ('error', 100, 2, 'lower'),
    'NLL': ('nll', 1, 3, 'lower'),
    'ECE %': ('ece', 100, 2, 'lower'),
}
SCALED = {  # by a temperature fitted on held-out data
    'temperature': ('temperature', 1, 2, None),
    'NLL with it': ('nll_scaled', 1, 3, 'lower'),
    'ECE % with it': ('ece_scaled', 100, 2, 'lower'),
}
AURC = {'AURC x1000': ('aurc', 1000, 2, 'lower')}
COLUMNS = {  # section: title: (measure, factor, decimals, which is better)
    'digits': {**CLASSIFICATION, **AURC},
    'mnist': {**CLASSIFICATION, **SCALED, **AURC},
    'segmentation': {
        'mIoU %': ('mIoU', 1, 2, 'higher'),
        'ECE of pixels %': ('calibration/ece', 1, 3, 'lower'),
    },
    'translation': {
        'BLEU': ('bleu', 1, 1, 'higher'),
        'chrF': ('chrf', 1, 1, 'higher'),
        'NLL, bits a token': ('nll', 1, 3, 'lower'),
        'ECE %': ('ece', 100, 2, 'lower'),
        **SCALED,
    },
}


def sections() -> Dict[str, str]:
    """The tables of each section."""
    parts: Dict[str, list] = {}
    for path in sorted((DOCS / 'evidence').glob('*.csv')):
        name, _, panel = path.stem.partition('.')
        for title, groups in read_runs(str(path)).items():
            title = title or panel.replace('-', ' ')
            table = comparison_table(groups, COLUMNS[name])
            parts.setdefault(name, []).append(f'**{title}**\n\n{table}' if title else table)
    return {name: '\n\n'.join([*tables, NOTE]) for name, tables in parts.items()}


def main() -> None:
    for name, text in sections().items():
        write_section(str(DOCS / 'evidence.md'), name, text)
        print(f'{name}: written')


if __name__ == '__main__':
    main()
