"""Writes the tables and pictures in docs/evidence anew, from the measures of every run in docs/evidence/*.csv.

    python tools/evidence.py
    python tools/evidence.py run NAME [--data FOLDER] [--processes N]

The second trains what is missing of an experiment of experiments.py, as long as it is let run, and keeps a line for
each run in docs/evidence/raw/NAME.jsonl; the first makes its page, docs/evidence/NAME.md, from them as well.

The csv files are the runs.csv that reports leave (`selfkd compare`, `selfkd report-translation`, tools/demo.py).
SECTION.csv makes the section of that name, in the page that has it, and SECTION.svg; several SECTION.PANEL.csv make
one with a table for each.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import Dict, List, Sequence

from costs import write_section

from selfkd.comparison import NOTE, Run, comparison_table, read_runs

DOCS = Path(__file__).resolve().parent.parent / 'docs'
CLASSIFICATION = {
    'error %': ('error', 100, 2, 'lower'),
    'NLL': ('nll', 1, 3, 'lower'),
    'ECE %': ('ece', 100, 2, 'lower'),
}
SCALED = {  # by a temperature fitted on held-out data
    'temperature': ('temperature', 1, 2, None),
    'NLL scaled': ('nll_scaled', 1, 3, 'lower'),
    'ECE % scaled': ('ece_scaled', 100, 2, 'lower'),
}
CALIBRATION = {  # of detections
    'ECE %': ('calibration/ece', 1, 2, 'lower'),
    'detections': ('calibration/detections', 1, 0, None),
}
AURC = {'AURC x1000': ('aurc', 1000, 2, 'lower')}
COLUMNS = {  # section: title: (measure, factor, decimals, which is better)
    'digits': {**CLASSIFICATION, **AURC},
    'mnist': {**CLASSIFICATION, **SCALED, **AURC},
    'backbones': {
        'accuracy %': ('accuracy/top1', 1, 1, 'higher'),
        'NLL': ('calibration/nll', 1, 3, 'lower'),
        'ECE %': ('calibration/ece', 1, 2, 'lower'),
    },
    'detection': {
        'mAP@0.5 %': ('pascal_voc/mAP', 100, 1, 'higher'),
        **CALIBRATION,
    },
    'detectron2': {
        'AP %': ('bbox/AP', 1, 1, 'higher'),
        'AP50 %': ('bbox/AP50', 1, 1, 'higher'),
        **CALIBRATION,
    },
    'segmentation': {
        'mIoU %': ('mIoU', 1, 2, 'higher'),
        'ECE of pixels %': ('calibration/ece', 1, 3, 'lower'),
    },
    'translation': {
        'BLEU': ('bleu', 1, 1, 'higher'),
        'chrF': ('chrf', 1, 1, 'higher'),
        'NLL (bits)': ('nll', 1, 3, 'lower'),
        'ECE %': ('ece', 100, 2, 'lower'),
        **SCALED,
    },
}

EXPERIMENTS = {  # by the module that trains them
    'cifar': {**CLASSIFICATION, **SCALED, **AURC, 'AUROC %': ('auroc', 100, 1, 'higher')},
    'language_model': {**CLASSIFICATION, **SCALED},
    'detector': COLUMNS['detection'],
    'translator': {**COLUMNS['translation'], 'BLEU 2017': ('bleu_2017', 1, 1, 'higher')},
    'bccd': {
        **COLUMNS['detection'],
        **{f'{name} AP50 %': (f'pascal_voc/AP50_{name}', 100, 1, 'higher') for name in ('RBC', 'WBC', 'Platelets')},
    },
    'camvid': COLUMNS['segmentation'],
}
DRAWN = {  # section: what its picture has of the columns, if not all
    'digits': ('error %', 'NLL', 'ECE %'),
    'mnist': ('error %', 'NLL scaled', 'ECE %'),
    'detection': ('mAP@0.5 %', 'ECE %'),
    'detectron2': ('AP50 %', 'ECE %'),
    'translation': ('chrF', 'NLL (bits)', 'ECE %'),
}
EXPERIMENTS_DRAWN = (
    'error %',
    'BLEU',
    'NLL',
    'NLL (bits)',
    'mAP@0.5 %',
    'mIoU %',
    'ECE %',
    'ECE of pixels %',
    'NLL scaled',
)
SMALLER = {  # on the papers' data, but smaller: methods and measures that docs/reproduce.md has of an experiment
    'cifar10-4000': (('plain', 'PS-KD 0.8', 'CS-KD', 'FRSKD'), ('error %', 'NLL', 'ECE %', 'AURC x1000')),
}
WHEN = {'last': 'at the end', 'early': 'when held-out NLL was lowest'}
PAGE = """\
# {title}

{done} of {all} runs are done. `python tools/evidence.py` writes this page from [raw/{name}.jsonl](raw/{name}.jsonl).

![difference to the first method]({name}.svg)

## On the test set

{tables}

{note}
{held_out}
## How

{how}

Settings: {settings}. Code of the runs: commit {commits}.
"""

Panels = Dict[str, Dict[str, List[Run]]]


def measured() -> Dict[str, Panels]:
    """The runs of each section: panel title -> group -> measures."""
    found: Dict[str, Panels] = {}
    for path in sorted((DOCS / 'evidence').glob('*.csv')):
        name, _, panel = path.stem.partition('.')
        for title, groups in read_runs(str(path)).items():
            found.setdefault(name, {})[title or panel.replace('-', ' ')] = groups
    return found


def sections() -> Dict[str, str]:
    """The tables of each section."""
    texts = {}
    for name, panels in measured().items():
        tables = {title: comparison_table(groups, COLUMNS[name]) for title, groups in panels.items()}
        parts = [f'**{title}**\n\n{table}' if title else table for title, table in tables.items()]
        texts[name] = '\n\n'.join([*parts, NOTE])
    return texts


def pages() -> Dict[str, Path]:
    """The page that has each section."""
    found = sorted((DOCS / 'evidence').glob('*.md'))
    return {name: path for path in found for name in re.findall(r'<!-- end (.*) -->', path.read_text())}


def draw(name: str, panels: Panels, columns: Dict[str, tuple], drawn: Sequence[str]) -> None:
    """Writes NAME.svg, with some of the columns."""
    import forest

    forest.draw(str(DOCS / f'evidence/{name}.svg'), panels, {title: columns[title] for title in drawn})


def trained(name: str) -> Dict[str, Dict[str, List[dict]]]:
    """The finished runs of an experiment: panel -> method -> lines of its raw results.

    Without the panels that have no two runs of each method yet: they say nothing.
    """
    import experiment_runner
    import experiments

    experiment, found = experiments.EXPERIMENTS[name], {}
    for run in experiment_runner.finished(DOCS / f'evidence/raw/{name}.jsonl', experiment):
        found.setdefault(run['panel'], {method: [] for method in experiment.methods})[run['method']].append(run)
    return {panel: of_panel for panel, of_panel in found.items() if all(len(runs) > 1 for runs in of_panel.values())}


def panels_of(runs: Dict[str, Dict[str, List[dict]]]) -> Panels:
    """What the finished runs measured, at the end and earlier, where that is not the same."""
    panels = {}
    for panel, of_panel in runs.items():
        measures = [run['measures'] for of in of_panel.values() for run in of]
        for key, when in WHEN.items():
            if key == 'last' or any(found.get(key, found['last']) != found['last'] for found in measures):
                panels[f'{panel}, {when}'.strip(', ')] = {
                    method: [dict(run['measures'][key], seed=run['seed']) for run in of]
                    for method, of in of_panel.items()
                }
    return panels


def experiment_page(name: str) -> str:
    """Picture, tables and how it was done."""
    import experiments

    experiment, runs = experiments.EXPERIMENTS[name], trained(name)
    lines = [line for of_panel in runs.values() for of_method in of_panel.values() for line in of_method]
    columns = EXPERIMENTS[experiment.module]
    return PAGE.format(
        name=name,
        title=experiment.title,
        done=len(lines),
        all=experiment.seeds * len(experiment.methods) * len(experiment.panels),
        tables='\n\n'.join(f'**{title}**\n\n{comparison_table(of, columns)}' for title, of in panels_of(runs).items()),
        note=NOTE,
        held_out=held_out_section(runs) if 'epochs' in lines[0] else '',
        how=re.sub(r'(?<!\n)\n(?![ \n])', ' ', experiment.how),  # a paragraph is a line
        settings=', '.join(f'`{key}={value}`' for key, value in experiment.settings.items()),
        commits=', '.join(sorted({line['commit'] for line in lines})),
    )


def smaller() -> str:
    """Means at the end of training of the experiments on the papers' data."""
    import experiments

    parts = []
    for name, (methods, titles) in SMALLER.items():
        for of_method in trained(name).values():
            groups = {method: [run['measures']['last'] for run in of_method[method]] for method in methods}
            columns = EXPERIMENTS[experiments.EXPERIMENTS[name].module]
            means, _, _ = comparison_table(groups, {title: columns[title] for title in titles}).partition('\n\n')
            parts.append(f'[{experiments.EXPERIMENTS[name].title}](evidence/{name}.md)\n\n{means}')
    return '\n\n'.join(parts)


def held_out_section(runs: Dict[str, Dict[str, List[dict]]]) -> str:
    """With a table for each panel."""
    tables = [(f'**{panel}**\n\n' if panel else '') + held_out_table(of_panel) for panel, of_panel in runs.items()]
    return '\n'.join(['', '## On held-out data, while training', '', '\n\n'.join(tables), ''])


def held_out_table(of_method: Dict[str, List[dict]]) -> str:
    """Means over the runs: when the held-out NLL was lowest, and how far training went on from there."""
    rows = [
        '| | runs | epoch of the lowest NLL | NLL then | at the end | error % then | at the end | seconds of a core |',
        '| --- ' * 8 + '|',
    ]
    for method, runs in of_method.items():
        logs = [run['epochs'] for run in runs]
        best = [min(range(len(log)), key=lambda i, log=log: log[i][1]) for log in logs]
        nll, error = ([(log[i][k], log[-1][k]) for log, i in zip(logs, best)] for k in (1, 2))
        cells = [f'{fmean(best) + 1:.1f}', *(f'{fmean(ends):.3f}' for ends in zip(*nll))]
        cells += [f'{100 * fmean(ends):.1f}' for ends in zip(*error)]
        cells.append(f'{fmean(run["seconds"] for run in runs):.0f}')
        rows.append(f'| {method} | {len(runs)} | {" | ".join(cells)} |')
    return '\n'.join(rows)


def main(arguments: Sequence[str] = ()) -> None:
    import experiments

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = parser.add_subparsers(dest='command', metavar='run').add_parser('run', help='train what is missing')
    run.add_argument('name', choices=list(experiments.EXPERIMENTS))
    run.add_argument('--data', default='work_dirs/evidence-data', help='folder of the data (default: %(default)s)')
    run.add_argument('--processes', type=int, default=os.cpu_count(), help='a thread each (default: one per core)')
    for part in ('methods', 'panels'):
        run.add_argument(f'--{part}', nargs='+', metavar='NAME', help='only these, so that their seeds come first')
    args = parser.parse_args(arguments)
    if args.command == 'run':
        import experiment_runner

        raw = DOCS / f'evidence/raw/{args.name}.jsonl'
        experiment = experiments.EXPERIMENTS[args.name].only(methods=args.methods, panels=args.panels)
        experiment_runner.train_missing(raw, experiment, args.data, args.processes)
        return
    for name, text in sections().items():
        write_section(str(pages()[name]), name, text)
        draw(name, measured()[name], COLUMNS[name], DRAWN.get(name, list(COLUMNS[name])))
        print(f'{name}: written')
    for name in filter(trained, experiments.EXPERIMENTS):
        columns = EXPERIMENTS[experiments.EXPERIMENTS[name].module]
        draw(name, panels_of(trained(name)), columns, [title for title in EXPERIMENTS_DRAWN if title in columns])
        (DOCS / f'evidence/{name}.md').write_text(experiment_page(name))
        print(f'{name}.md: written')
    if smaller():
        write_section(str(DOCS / 'reproduce.md'), 'smaller', smaller())


if __name__ == '__main__':
    main(sys.argv[1:])
