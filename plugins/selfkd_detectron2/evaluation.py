"""Calibration of detections."""

from itertools import chain
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.utils import comm
from torch import Tensor

from selfkd.metrics import check_detection_calibration, detection_calibration

__all__ = ['DetectionCalibration']


class DetectionCalibration(DatasetEvaluator):
    """How far the scores of detections are from their precision: ``ece`` in percent, and ``detections``, their number.

    The expected calibration error of the scores over all detections of all classes with a score of at least
    ``score_thr``, where a detection is right if it is a true positive of VOC's matching: the best-scored one of its
    class that overlaps an object with an IoU of at least ``iou_thr``. Detections of crowds (COCO) and of difficult
    objects (VOC) count neither way. NaN where there are none. This is D-ECE without box positions:

    Küppers et al., "Multivariate Confidence Calibration for Object Detection", CVPR Workshops 2020
    https://arxiv.org/abs/2004.13546

    For registered data sets of boxes with annotations. ``selfkd train-detectron2`` evaluates VOC's kind with it; beside
    another evaluator it stands in ``DatasetEvaluators([COCOEvaluator(name), DetectionCalibration(name)])``.

    Args:
        dataset_name: as in ``DATASETS.TEST``.
        score_thr: a floor for the scores; below ``MODEL.ROI_HEADS.SCORE_THRESH_TEST`` there are no detections.
        iou_thr: least IoU with the object.
        bins: equal intervals of the score.
    """

    def __init__(self, dataset_name: str, *, score_thr: float = 0.05, iou_thr: float = 0.5, bins: int = 10):
        check_detection_calibration(score_thr, iou_thr, bins)
        self.score_thr, self.iou_thr, self.bins = score_thr, iou_thr, bins
        self._objects = {image['image_id']: _objects(image, dataset_name) for image in DatasetCatalog.get(dataset_name)}
        self.reset()

    def reset(self) -> None:
        self._pairs: List[Tuple[float, float]] = []  # score and whether it is right, of each detection

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs):
            found = output['instances'].to('cpu')
            found, objects = found[found.scores >= self.score_thr], self._objects[image['image_id']]
            for label in found.pred_classes.unique():
                mine = found[found.pred_classes == label]
                mine = mine[mine.scores.argsort(descending=True, stable=True)]
                right, counted = _matched(mine.pred_boxes, objects[objects.gt_classes == label], self.iou_thr)
                self._pairs += zip(mine.scores[counted].tolist(), right[counted].tolist())

    def evaluate(self) -> Optional[Dict[str, Dict[str, float]]]:
        pairs = list(chain(*comm.gather(self._pairs)))
        if not comm.is_main_process():
            return None
        return {'calibration': detection_calibration(pairs, bins=self.bins)}


def _objects(image: Dict[str, Any], dataset_name: str) -> Instances:
    """The boxes of an image, their classes, and whether they are counted."""
    if 'annotations' not in image:
        raise ValueError(f'DetectionCalibration: {dataset_name} has no annotations to compare detections with')
    annotations, meta = image['annotations'], MetadataCatalog.get(dataset_name)
    counted = [not one.get('iscrowd', 0) for one in annotations]
    if meta.get('evaluator_type') == 'pascal_voc':  # whose difficult objects Detectron2's data set does not tell
        record = parse_rec(str(Path(meta.dirname, 'Annotations', f'{image["image_id"]}.xml')))
        counted = [not one['difficult'] for one in record]
    boxes = [BoxMode.convert(one['bbox'], one['bbox_mode'], BoxMode.XYXY_ABS) for one in annotations]
    return Instances(
        (image['height'], image['width']),
        gt_boxes=Boxes(torch.tensor(boxes).view(-1, 4)),
        gt_classes=torch.tensor([one['category_id'] for one in annotations], dtype=torch.long),
        counted=torch.tensor(counted, dtype=torch.bool),
    )


def _matched(boxes: Boxes, objects: Instances, iou_thr: float) -> Tuple[Tensor, Tensor]:
    """Of the detections of a class, best first: whether each is right, and whether it is counted."""
    right, counted = torch.zeros(len(boxes), dtype=torch.bool), torch.ones(len(boxes), dtype=torch.bool)
    if not len(objects):
        return right, counted
    found = set()
    for i, (iou, j) in enumerate(zip(*(part.tolist() for part in pairwise_iou(boxes, objects.gt_boxes).max(1)))):
        if iou < iou_thr:
            continue
        counted[i] = objects.counted[j]
        right[i] = counted[i] and j not in found
        found.add(j)
    return right, counted
