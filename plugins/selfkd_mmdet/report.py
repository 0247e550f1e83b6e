"""Finished MMDetection runs side by side: a table of their test metrics, and detections drawn on test images."""

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from mmdet.structures import DetDataSample
from mmengine.hooks import Hook
from mmengine.runner import Runner

from selfkd.cli import command_parser
from selfkd.comparison import NOTE, comparison_table
from selfkd.runs import parse_groups
from selfkd_mmengine.report import finished_run, seed_of

__all__ = ['Detections', 'detect', 'draw', 'table']

COLUMNS = {  # column title: (metric, factor, decimals, which is better)
    'mAP@0.5 %': ('pascal_voc/mAP', 100, 1, 'higher'),
    'ECE %': ('calibration/ece', 1, 1, 'lower'),
    'detections': ('calibration/detections', 1, 0, None),
}


class Detections(NamedTuple):
    """Of a run on its test set.

    Attributes:
        metrics: of its ``test_evaluator``.
        samples: MMDetection's data samples, with ``gt_instances`` and ``pred_instances``, in the order of the data set.
        classes: names.
        seed: of the config, if it has one; says which runs of two methods are compared.
    """

    metrics: Dict[str, float]
    samples: List[DetDataSample]
    classes: Sequence[str]
    seed: Optional[int] = None


def detect(work_dir: str) -> Detections:
    """Tests a finished run's last checkpoint as its own config (the one ``*.py`` in its folder) says.

    Raises:
        FileNotFoundError: no config or checkpoint in ``work_dir``.
    """
    cfg, checkpoint = finished_run(work_dir)
    cfg.load_from, cfg.resume = checkpoint, False
    cfg.work_dir, cfg.log_level = str(Path(work_dir, 'test')), 'ERROR'
    runner = Runner.from_cfg(cfg)
    samples = []
    runner.register_hook(_Keep(samples))
    metrics = runner.test()
    return Detections(metrics, samples, runner.test_dataloader.dataset.metainfo['classes'], seed_of(cfg))


class _Keep(Hook):
    def __init__(self, samples: list):
        self.samples = samples

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.samples += [sample.cpu() for sample in outputs]


def table(groups: Dict[str, List[Detections]]) -> str:
    """Markdown tables of the groups of runs, and of their differences to the first (:func:`comparison_table`)."""
    measured = {
        name: [run.metrics if run.seed is None else {**run.metrics, 'seed': run.seed} for run in runs]
        for name, runs in groups.items()
    }
    text = comparison_table(measured, COLUMNS)
    return f'{text}\n\n{NOTE}' if len(groups) > 1 else text


def draw(groups: Dict[str, List[Detections]], path: str, *, images: int = 2, score_thr: float = 0.3) -> None:
    """Draws the truth and each group's first run on the test images with the most objects; a row per image.

    Green is right (class, and IoU of at least 0.5 with an object of it), red is wrong. Of boxes that overlap by half
    only the best-scored is drawn.

    Args:
        score_thr: detections below are left out.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    runs = {name: group[0] for name, group in groups.items()}
    first = next(iter(runs.values()))
    order = sorted(range(len(first.samples)), key=lambda i: -len(first.samples[i].gt_instances))[:images]
    columns = ['truth', *runs]
    figure, axes = plt.subplots(images, len(columns), figsize=(3 * len(columns), 3 * images), squeeze=False)
    for column, name in enumerate(columns):
        axes[0, column].set_title(name)
    for row, index in zip(axes, order):
        picture = plt.imread(first.samples[index].img_path)
        for axis, name in zip(row, columns):
            axis.imshow(picture)
            axis.set_axis_off()
            if name == 'truth':
                found = first.samples[index].gt_instances
                labels = [(box, label, '', 'white') for box, label in zip(found.bboxes, found.labels)]
            else:
                truth, found = runs[name].samples[index].gt_instances, runs[name].samples[index].pred_instances
                found = found[found.scores >= score_thr]
                found = found[found.scores.argsort(descending=True)]
                labels = []
                for box, label, score in zip(found.bboxes, found.labels, found.scores):
                    if any(_iou(box, shown) >= 0.5 for shown, *_ in labels):
                        continue
                    right = any(_iou(box, b) >= 0.5 and label == y for b, y in zip(truth.bboxes, truth.labels))
                    labels.append((box, label, f' {score:.2f}', 'lime' if right else 'orangered'))
            for box, label, score, color in reversed(labels):  # the best-scored on top
                x1, y1, x2, y2 = box.tolist()
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.5))
                text = axis.text(x1, y1 - 1, first.classes[label] + score, color='black', fontsize=7, va='bottom')
                text.set_bbox(dict(facecolor=color, edgecolor='none', pad=1, alpha=0.8))
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _iou(a, b) -> float:
    width = (min(a[2], b[2]) - max(a[0], b[0])).clamp(min=0)
    height = (min(a[3], b[3]) - max(a[1], b[1])).clamp(min=0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return (width * height / (areas - width * height)).item()


def main(arguments: Sequence[str]) -> None:
    """Compares finished MMDetection runs on their test sets: a table of mAP and calibration, and drawn detections.

        selfkd report-detection OUT NAME=WORK_DIR[,WORK_DIR...] [NAME=...]

    Runs given under one name are averaged (seeds), and compared with those of the first name, seed by seed; the
    pictures show the first of each. Each work dir's own config says which test set and metrics are used (VOCMetric and
    selfkd_mmdet.DetectionCalibration).
    """
    parser = command_parser('report-detection', main.__doc__)
    parser.add_argument('out', help='folder for table.md and detections.png')
    args, work_dirs = parse_groups(parser, arguments)
    groups = {name: [detect(folder) for folder in folders] for name, folders in work_dirs.items()}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    text = table(groups)
    (out / 'table.md').write_text(text + '\n')
    draw(groups, str(out / 'detections.png'))
    print(f'{text}\n\nwrote {out}')
