"""Tables and plots of finished MMPretrain runs: error, calibration, and ranking by confidence on the test set."""

import json
import statistics
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint
from mmengine.utils import import_modules_from_strings
from mmpretrain.registry import MODELS
from torch import Tensor

from selfkd import metrics

__all__ = ['Predictions', 'measure', 'plot_reliability', 'plot_risk_coverage', 'predict', 'table']

MEASURES = {  # column title: (key, factor, decimals); as in PS-KD's tables
    'error %': ('error', 100, 2),
    'NLL': ('nll', 1, 3),
    'ECE %': ('ece', 100, 2),
    'AURC x1000': ('aurc', 1000, 2),
}


class Predictions(NamedTuple):
    """A run's test-set predictions: probs ``[N, C]`` and class ids ``[N]``."""

    probs: Tensor
    labels: Tensor


def predict(work_dir: str, checkpoint: Optional[str] = None) -> Predictions:
    """Runs a finished run's model over the test set of its own config.

    Args:
        work_dir: of the run; holds its config (one ``*.py``) and checkpoints.
        checkpoint: defaults to the run's last one.

    Raises:
        FileNotFoundError: no config or checkpoint in ``work_dir``.
    """
    folder = Path(work_dir)
    configs = sorted(folder.glob('*.py'))
    pointer = folder / 'last_checkpoint'
    if len(configs) != 1 or not (checkpoint or pointer.exists()):
        raise FileNotFoundError(
            f'{work_dir}: a finished MMPretrain run has one config (*.py) and last_checkpoint; found '
            f'{len(configs)} configs, last_checkpoint {"present" if pointer.exists() else "missing"}'
        )
    cfg = Config.fromfile(configs[0])
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    if cfg.get('custom_imports'):
        import_modules_from_strings(**cfg.custom_imports)
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    load_checkpoint(model, checkpoint or pointer.read_text().strip(), 'cpu', strict=True, logger='silent')
    model.to('cuda' if torch.cuda.is_available() else 'cpu').eval()
    samples = []
    with torch.no_grad():
        for batch in Runner.build_dataloader(cfg.test_dataloader):
            samples += model.test_step(batch)
    return Predictions(
        torch.stack([s.pred_score for s in samples]).cpu(), torch.cat([s.gt_label for s in samples]).cpu()
    )


def measure(predictions: Predictions) -> Dict[str, float]:
    """Every measure of one run, in natural units."""
    probs, labels = predictions
    return {
        'error': (probs.argmax(1) != labels).double().mean().item(),
        'nll': metrics.nll(probs, labels),
        'ece': metrics.calibration_error(probs, labels),
        'brier': metrics.brier(probs, labels),
        'aurc': metrics.aurc(probs, labels),
        'excess_aurc': metrics.excess_aurc(probs, labels),
    }


def table(groups: Dict[str, List[Dict[str, float]]]) -> str:
    """A Markdown table: a row for each group of runs, mean and (from two runs on) standard deviation."""
    rows = [['', 'runs', *MEASURES]]
    for name, runs in groups.items():
        cells = []
        for key, factor, decimals in MEASURES.values():
            values = [run[key] * factor for run in runs]
            spread = f' ± {statistics.stdev(values):.{decimals}f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.{decimals}f}{spread}')
        rows.append([name, str(len(runs)), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in rows]
    lines.insert(1, '| ' + ' | '.join('-' * width for width in widths) + ' |')
    return '\n'.join(lines)


def plot_reliability(panels: Dict[str, Dict[str, List[Predictions]]], path: str, bins: int = 10) -> None:
    """Accuracy against confidence, in equal bins of the top confidence; all runs of a group pooled.

    Bins of fewer than 10 samples are not drawn; they count in the ECE.

    Args:
        panels: panel title -> group name -> runs.
        path: of the PNG.
    """

    def draw(ax, name, probs, labels):
        confidence, predicted = probs.max(1)
        which = (confidence * bins).ceil().long().clamp(1, bins) - 1
        xs, ys = [], []
        for b in range(bins):
            inside = which == b
            if inside.sum() >= 10:
                xs.append(confidence[inside].mean().item())
                ys.append((predicted == labels)[inside].float().mean().item())
        ece = metrics.calibration_error(probs, labels, bins=bins)
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


def _plot(panels, path, draw, finish) -> None:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(5 * len(panels), 4.2), layout='constrained')
    for ax, (title, groups) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, runs in groups.items():
            draw(ax, name, torch.cat([run.probs for run in runs]), torch.cat([run.labels for run in runs]))
        finish(ax)
        ax.set_title(title)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def write_report(panels: Dict[str, Dict[str, List[Predictions]]], out: str) -> str:
    """Writes ``table.md``, ``runs.json`` (every measure of every run) and both plots; returns the table(s)."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    measured = {
        title: {name: [measure(run) for run in runs] for name, runs in groups.items()}
        for title, groups in panels.items()
    }
    text = '\n\n'.join(f'{title}\n\n{table(groups)}' if title else table(groups) for title, groups in measured.items())
    (folder / 'table.md').write_text(text + '\n')
    (folder / 'runs.json').write_text(json.dumps(measured, indent=2))
    plot_reliability(panels, str(folder / 'reliability.png'))
    plot_risk_coverage(panels, str(folder / 'risk_coverage.png'))
    return text
