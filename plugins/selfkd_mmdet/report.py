"""Finished MMDetection runs side by side: a table of their test metrics, and detections drawn on test images."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from selfkd.cli import command_parser, refusing
from selfkd.comparison import Column
from selfkd.files import replacing
from selfkd.runs import columns_of, parse_groups, shared_measures, write_table
from selfkd_mmengine.report import check_runs, finished_run, seed_of

__all__ = ['Detections', 'detect', 'draw']

COLUMNS = {  # column title: (metric, factor, decimals, which is better)
    'mAP@0.5 %': Column('pascal_voc/mAP', 100, 1, 'higher'),
    'ECE %': Column('calibration/ece', 1, 1, 'lower'),
    'detections': Column('calibration/detections', 1, 0, None),
}

Label = Tuple[Tensor, Any, str, str]  # a box, its class (an integer tensor), the score as it is shown, and its color


class Detections(NamedTuple):
    """Of a run on its test set.

    Attributes:
        metrics: of its ``test_evaluator``, and ``seed`` if its config has one.
        samples: MMDetection's data samples, with ``gt_instances`` and ``pred_instances``, in the order of the data set.
        classes: names.
    """

    metrics: Dict[str, float]
    samples: List[DetDataSample]
    classes: Sequence[str]


def detect(work_dir: str) -> Detections:
    """Tests a finished run's last checkpoint as its own config (the one ``*.py`` in its folder) says.

    Raises:
        FileNotFoundError: no config or checkpoint in ``work_dir``.
    """
    cfg, checkpoint = finished_run(work_dir)
    cfg.load_from, cfg.resume = checkpoint, False
    cfg.work_dir, cfg.log_level = str(Path(work_dir, 'test')), 'ERROR'
    runner = Runner.from_cfg(cfg)
    samples: List[DetDataSample] = []
    runner.register_hook(_Keep(samples))
    metrics, seed = runner.test(), seed_of(cfg)
    if seed is not None:
        metrics['seed'] = seed
    return Detections(metrics, samples, runner.test_dataloader.dataset.metainfo['classes'])


class _Keep(Hook):
    def __init__(self, samples: list):
        self.samples = samples

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.samples += [sample.cpu() for sample in outputs]


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
            labels = _truth(first.samples[index]) if name == 'truth' else _found(runs[name].samples[index], score_thr)
            for box, label, score, color in reversed(labels):  # the best-scored on top
                x1, y1, x2, y2 = box.tolist()
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.5))
                text = axis.text(x1, y1 - 1, first.classes[label] + score, color='black', fontsize=7, va='bottom')
                text.set_bbox(dict(facecolor=color, edgecolor='none', pad=1, alpha=0.8))
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, dpi=90)
    plt.close(figure)


def _truth(sample: DetDataSample) -> List[Label]:
    objects = sample.gt_instances
    return [(box, label, '', 'white') for box, label in zip(objects.bboxes, objects.labels)]


def _found(sample: DetDataSample, score_thr: float) -> List[Label]:
    """The detections to draw, best-scored first."""
    truth, found = sample.gt_instances, sample.pred_instances
    found = found[found.scores >= score_thr]
    found = found[found.scores.argsort(descending=True)]
    hidden_by = bbox_overlaps(found.bboxes, found.bboxes) >= 0.5
    hits = bbox_overlaps(found.bboxes, truth.bboxes) >= 0.5
    right = (hits & (found.labels[:, None] == truth.labels)).any(1)
    shown: List[int] = []
    for i in range(len(found)):
        if not hidden_by[i, shown].any():
            shown.append(i)
    colors = ['lime' if right[i] else 'orangered' for i in shown]
    return [(found.bboxes[i], found.labels[i], f' {found.scores[i]:.2f}', color) for i, color in zip(shown, colors)]


def main(arguments: Sequence[str]) -> None:
    """Compares finished MMDetection runs on their test sets: a table of mAP and calibration, and drawn detections.

        selfkd report-detection OUT NAME=WORK_DIR[,WORK_DIR...] [NAME=...]

        selfkd report-detection work_dirs/report plain=work_dirs/baseline_0 PS-KD=work_dirs/pskd_0

    Runs given under one name are averaged (seeds), and compared with those of the first name, seed by seed; the
    pictures show the first of each. Each work dir's own config says which test set and metrics are used. The table has
    those of VOCMetric and selfkd_mmdet.DetectionCalibration, or where there are none of these, all that every run has.
    """
    parser = command_parser('report-detection', main.__doc__)
    parser.add_argument('out', help='folder for table.md, runs.csv and detections.png')
    args, work_dirs = parse_groups(parser, arguments)
    with refusing(parser):
        check_runs(work_dirs)
    groups = {name: [detect(folder) for folder in folders] for name, folders in work_dirs.items()}
    measured = {name: [run.metrics for run in runs] for name, runs in groups.items()}
    shared = shared_measures(measured)
    columns = {title: column for title, column in COLUMNS.items() if column.key in shared} or columns_of(shared)
    with refusing(parser):
        text = write_table(args.out, measured, columns)
        draw(groups, str(Path(args.out, 'detections.png')))
    print(f'{text}\n\nwrote {args.out}')
