"""Trains and measures one run of an experiment on BCCD, blood cells in VOC's layout: see experiments.py."""

from pathlib import Path
from typing import Dict

import openmmlab_run
from mmdet.evaluation import VOCMetric, eval_map
from mmdet.registry import METRICS
from openmmlab_run import CLONE


@METRICS.register_module()
class APByClass(VOCMetric):
    """Also logs what VOCMetric only prints: the average precision of each class, at an IoU of 0.5."""

    def compute_metrics(self, results: list) -> Dict[str, float]:
        labels, detections = zip(*results)
        classes = self.dataset_meta['classes']
        how = dict(iou_thr=0.5, dataset=classes, logger='silent', eval_mode=self.eval_mode, use_legacy_coordinate=True)
        _, found = eval_map(detections, labels, **how)
        of_class = {f'AP50_{name}': float(one['ap']) for name, one in zip(classes, found)}
        return {**super().compute_metrics(results), **of_class}


def prepare(folder: str) -> Path:
    """The data. FileNotFoundError: they are not there; the message says how to get them."""
    place = Path(folder) / 'BCCD'
    if not (place / 'ImageSets/Main').is_dir():
        raise FileNotFoundError(
            f'{folder}: must hold BCCD/ImageSets/Main, BCCD/Annotations and BCCD/JPEGImages:\n'
            f'  {CLONE}/Shenggan/BCCD_Dataset {folder}/BCCD_Dataset && ln -s BCCD_Dataset/BCCD {place}'
        )
    return place


def run(folder: str, settings: dict, seed: int) -> dict:
    """Trains one detector in MMDetection: see [`openmmlab_run.train`][]."""
    options = {'val_evaluator.0.type': 'APByClass', **settings.get('options', {})}
    return openmmlab_run.train(settings['config'], f'{prepare(folder)}/', seed, options)
