"""Tables and plots of finished MMPretrain runs: error, calibration, and ranking by confidence on the test set."""

import copy
import json
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint
from mmengine.utils import import_modules_from_strings
from mmpretrain.registry import MODELS
from torch import Tensor

from selfkd import metrics
from selfkd.cli import command_parser, refusing
from selfkd.comparison import Column, check_seeds, comparison_table, note, write_runs
from selfkd.files import load, output_folder, replacing
from selfkd.runs import parse_groups
from selfkd_mmengine.configs import load_config

__all__ = ['Predictions', 'check_runs', 'finished_run', 'measure', 'plot_reliability', 'plot_risk_coverage', 'plot_roc']
__all__ += ['predict', 'table', 'tables']

MEASURES = {  # column title: (key, factor, decimals, which is better); as in the papers' tables
    'error %': ('error', 100, 2, 'lower'),
    'NLL': ('nll', 1, 3, 'lower'),
    'ECE %': ('ece', 100, 2, 'lower'),
    'temperature': ('temperature', 1, 2, None),
    'NLL scaled': ('nll_scaled', 1, 3, 'lower'),
    'ECE % scaled': ('ece_scaled', 100, 2, 'lower'),
    'AURC x1000': ('aurc', 1000, 2, 'lower'),
    'E-AURC x1000': ('excess_aurc', 1000, 2, 'lower'),
    'Brier': ('brier', 1, 3, 'lower'),
    'R@1 %': ('recall_at_1', 100, 2, 'higher'),
    'OOD AUROC': ('auroc', 1, 3, 'higher'),
    'OOD AUPR': ('aupr', 1, 3, 'higher'),
    'OOD FPR95 %': ('fpr95', 100, 1, 'lower'),
}


class Predictions(NamedTuple):
    """A run's test-set predictions.

    Attributes:
        probs: ``[N, C]``.
        labels: class ids ``[N]``.
        features: what the head's linear classifier reads, ``[N, D]``; None for heads without one.
        ood_probs: of out-of-distribution images, ``[M, C]``, if there were any.
        held_out: probabilities ``[K, C]`` and labels ``[K]`` of images held out of the training data, to fit a
            temperature on: the config's validation set, where that is not the test set.
        seed: of the config, if it has one; says which runs of two methods are compared.
    """

    probs: Tensor
    labels: Tensor
    features: Optional[Tensor] = None
    ood_probs: Optional[Tensor] = None
    held_out: Optional[Tuple[Tensor, Tensor]] = None
    seed: Optional[int] = None


def predict(work_dir: str, checkpoint: Optional[str] = None, *, ood: Optional[str] = None) -> Predictions:
    """Runs a finished run's model over the test set of its own config.

    Args:
        work_dir: of the run; holds its config (one ``*.py``) and checkpoints.
        checkpoint: defaults to the run's last one.
        ood: a folder with out-of-distribution images (at any depth), which go through the same test pipeline.

    Raises:
        FileNotFoundError: no config or checkpoint in ``work_dir``.
    """
    cfg, checkpoint = finished_run(work_dir, checkpoint)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    if cfg.get('custom_imports'):
        import_modules_from_strings(**cfg.custom_imports)
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    load_checkpoint(model, checkpoint, 'cpu', strict=True, logger='silent')
    model.to('cuda' if torch.cuda.is_available() else 'cpu').eval()
    features = []
    fc = getattr(model.head, 'fc', None)
    handle = fc.register_forward_pre_hook(lambda module, args: features.append(args[0].cpu())) if fc else None
    samples = _run(model, cfg.test_dataloader)
    if handle:
        handle.remove()
    ood_probs = None
    if ood is not None:
        loader = copy.deepcopy(cfg.test_dataloader)
        pipeline = loader.dataset.pipeline
        if not any(str(step['type']).endswith('LoadImageFromFile') for step in pipeline):
            raise ValueError(
                f'{work_dir}: its test pipeline loads no image files, so it cannot read {ood}: use OODMetric'
            )
        loader.dataset = dict(type='CustomDataset', data_root=str(ood), with_label=False, pipeline=pipeline)
        ood_probs = torch.stack([s.pred_score for s in _run(model, loader)]).cpu()
    held_out = None
    if cfg.get('val_dataloader') and cfg.val_dataloader.dataset != cfg.test_dataloader.dataset:
        held_out = _scores(_run(model, cfg.val_dataloader))
    return Predictions(*_scores(samples), torch.cat(features) if features else None, ood_probs, held_out, seed_of(cfg))


def _scores(samples: list) -> Tuple[Tensor, Tensor]:
    probs, labels = torch.stack([s.pred_score for s in samples]), torch.cat([s.gt_label for s in samples])
    return probs.cpu(), labels.cpu()


@torch.no_grad()
def _run(model, loader: dict) -> list:
    return [sample for batch in Runner.build_dataloader(loader) for sample in model.test_step(batch)]


def measure(predictions: Predictions) -> Dict[str, float]:
    """Every measure of one run, in natural units, and its seed if that is known."""
    probs, labels = predictions.probs, predictions.labels
    measures = {
        'error': (probs.argmax(1) != labels).double().mean().item(),
        'nll': metrics.nll(probs, labels),
        'ece': metrics.calibration_error(probs, labels),
        'brier': metrics.brier(probs, labels),
        'aurc': metrics.aurc(probs, labels),
        'excess_aurc': metrics.excess_aurc(probs, labels),
    }
    if predictions.held_out is not None:
        held_out, held_out_labels = predictions.held_out
        smallest = torch.finfo(held_out.dtype).tiny
        temperature = metrics.fit_temperature(held_out.clamp(min=smallest).log(), held_out_labels)
        scaled = metrics.apply_temperature(probs, temperature)
        measures['temperature'] = temperature
        measures['nll_scaled'] = metrics.nll(scaled, labels)
        measures['ece_scaled'] = metrics.calibration_error(scaled, labels)
    if predictions.features is not None:
        measures['recall_at_1'] = metrics.recall_at_1(predictions.features, labels)
    if predictions.ood_probs is not None:
        measures.update(metrics.ood_scores(probs, predictions.ood_probs))
    if predictions.seed is not None:
        measures['seed'] = predictions.seed
    return measures


def table(groups: Dict[str, List[Dict[str, float]]], columns: Optional[Sequence[str]] = None) -> str:
    """Markdown tables of the groups of runs, and of their differences to the first (``comparison_table``).

    Args:
        groups: name -> what ``measure`` gave for each of its runs.
        columns: titles out of ``MEASURES``; by default those that all runs have.
    """
    everything = [run for runs in groups.values() for run in runs]
    columns = columns or [title for title, (key, *_) in MEASURES.items() if all(key in run for run in everything)]
    return comparison_table(groups, {title: Column(*MEASURES[title]) for title in columns})


def tables(panels: Dict[str, Dict[str, List[Dict[str, float]]]], columns: Optional[Sequence[str]] = None) -> str:
    """``table`` of each panel below its title, and how to read them (arguments as there)."""
    parts = [f'{title}\n\n{table(groups, columns)}'.lstrip() for title, groups in panels.items()]
    if any(len(groups) > 1 for groups in panels.values()):
        parts.append(note(*panels.values()))
    return '\n\n'.join(parts)


def plot_reliability(panels: Dict[str, Dict[str, List[Predictions]]], path: str, bins: int = 10) -> None:
    """Accuracy against confidence, in equal bins of the top confidence; all runs of a group pooled.

    Bins of fewer than 10 samples are not drawn; they count in the ECE.

    Args:
        panels: panel title -> group name -> runs.
        path: of the PNG.
    """

    def draw(ax, name, probs, labels):
        confidence, correct = metrics.confidence_of(probs, labels)
        which = metrics.confidence_bins(confidence, bins)
        inside = [which == b for b in range(bins) if (which == b).sum() >= 10]
        xs, ys = ([values[among].mean().item() for among in inside] for values in (confidence, correct))
        ece = metrics.calibration_error_of(confidence, correct, bins=bins)
        ax.plot(xs, ys, marker='o', markersize=4, label=f'{name} (ECE {100 * ece:.1f} %)')

    def finish(ax):
        ax.plot([0, 1], [0, 1], color='0.6', linestyle='--', linewidth=1, zorder=0)
        ax.set(xlabel='confidence', ylabel='accuracy', xlim=(0, 1.02), ylim=(0, 1.02))

    _plot(panels, path, draw, finish)


def plot_risk_coverage(panels: Dict[str, Dict[str, List[Predictions]]], path: str) -> None:
    """Error rate among the most confident share of the samples; all runs of a group pooled (arguments as above)."""

    def draw(ax, name, probs, labels):
        risks = metrics.risk_coverage(probs, labels)
        coverage = torch.arange(1, len(risks) + 1) / len(risks)
        start = len(risks) // 50  # the first few samples are noise
        ax.plot(coverage[start:], 100 * risks[start:], label=f'{name} (AURC {1000 * risks.mean():.1f}e-3)')

    def finish(ax):
        ax.set(xlabel='coverage (share of the samples answered)', ylabel='error %', xlim=(0, 1), ylim=(0, None))

    _plot(panels, path, draw, finish)


def plot_roc(panels: Dict[str, Dict[str, List[Predictions]]], path: str) -> None:
    """How well the confidence tells the test set from out-of-distribution images; runs pooled (arguments as above)."""

    def draw(ax, name, probs, labels, ood_probs):
        from sklearn.metrics import roc_curve

        positive = torch.cat([torch.ones(len(probs)), torch.zeros(len(ood_probs))])
        fpr, tpr, _ = roc_curve(positive, torch.cat([probs.amax(1), ood_probs.amax(1)]))
        ax.plot(fpr, tpr, label=f'{name} (AUROC {metrics.ood_scores(probs, ood_probs)["auroc"]:.3f})')

    def finish(ax):
        ax.set(xlabel='other images accepted', ylabel='test images accepted', xlim=(0, 1), ylim=(0, 1.02))

    _plot(panels, path, draw, finish, ood=True)


def _plot(panels, path, draw, finish, ood: bool = False) -> None:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(5 * len(panels), 4.2), layout='constrained')
    for ax, (title, groups) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, runs in groups.items():
            pooled = [torch.cat([run.probs for run in runs]), torch.cat([run.labels for run in runs])]
            draw(ax, name, *pooled, *([torch.cat([run.ood_probs for run in runs])] if ood else []))
        finish(ax)
        ax.set_title(title)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    output_folder(Path(path).parent)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130)


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


def write_report(
    panels: Dict[str, Dict[str, List[Predictions]]], out: str, columns: Optional[Sequence[str]] = None
) -> str:
    """Writes ``table.md``, every run's measures (``runs.json``, ``runs.csv``) and the plots; returns the table(s).

    ``ood_roc.png`` is among the plots where every run has out-of-distribution predictions.
    """
    folder = output_folder(out)
    measured = {
        title: {name: [measure(run) for run in runs] for name, runs in groups.items()}
        for title, groups in panels.items()
    }
    text = tables(measured, columns)
    for name, content in (('table.md', text + '\n'), ('runs.json', json.dumps(measured, indent=2))):
        with replacing(folder / name) as beside:
            beside.write_text(content, encoding='utf-8')
    write_runs(str(folder / 'runs.csv'), measured)
    plot_reliability(panels, str(folder / 'reliability.png'))
    plot_risk_coverage(panels, str(folder / 'risk_coverage.png'))
    if all(run.ood_probs is not None for groups in panels.values() for runs in groups.values() for run in runs):
        plot_roc(panels, str(folder / 'ood_roc.png'))
    return text


def main(arguments: Sequence[str]) -> None:
    """Compares finished MMPretrain runs on their test sets: table, reliability diagram, risk-coverage plot.

        selfkd report OUT NAME=WORK_DIR[,WORK_DIR...] [NAME=...] [--ood FOLDER]

        selfkd report work_dirs/report plain=work_dirs/plain_0,work_dirs/plain_1 'PS-KD=work_dirs/pskd_0'

    Runs given under one name are averaged (seeds), and compared with those of the first name, seed by seed. Each work
    dir's own config says which test set is used; on its validation set, where that is another, a temperature is fitted.
    """
    parser = command_parser('report', main.__doc__)
    parser.add_argument('out', help='folder for table.md, runs.json, runs.csv, reliability.png, risk_coverage.png')
    parser.add_argument(
        '--ood', metavar='FOLDER', help='images of another kind: adds AUROC, AUPR, FPR95 and ood_roc.png'
    )
    args, work_dirs = parse_groups(parser, arguments)
    with refusing(parser):
        check_runs(work_dirs)
        if args.ood and not Path(args.ood).is_dir():
            raise FileNotFoundError(f'--ood: {args.ood} is no folder')
    groups = {name: [predict(folder, ood=args.ood) for folder in folders] for name, folders in work_dirs.items()}
    with refusing(parser):
        print(write_report({'': groups}, args.out))
    print(f'\nwrote {args.out}')
