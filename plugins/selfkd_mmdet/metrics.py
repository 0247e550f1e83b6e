"""Calibration of detections."""

from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
from mmdet.evaluation.functional.mean_ap import tpfp_default
from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric

from selfkd.metrics import check_detection_calibration, detection_calibration

__all__ = ['DetectionCalibration']


@METRICS.register_module()
class DetectionCalibration(BaseMetric):
    """How far the scores of detections are from their precision: ``ece`` in percent, and ``detections``, their number.

    The expected calibration error of the scores over all detections of all classes with a score of at least
    ``score_thr``, where a detection is right if it is a true positive of VOC's matching: the best-scored one of its
    class that overlaps an object with an IoU of at least ``iou_thr``. Detections of difficult objects count
    neither way. NaN where there are none. This is D-ECE without box positions:

    Küppers et al., "Multivariate Confidence Calibration for Object Detection", CVPR Workshops 2020
    https://arxiv.org/abs/2004.13546

    For test sets with the annotations in the data samples, as ``VOCMetric``::

        val_evaluator = [dict(type='VOCMetric', metric='mAP'), dict(type='selfkd_mmdet.DetectionCalibration')]

    Args:
        score_thr: a floor for the scores; detectors leave many boxes with next to none.
        iou_thr: least IoU with the object.
        bins: equal intervals of the score.
        collect_device, prefix: as in mmengine's metrics.
    """

    default_prefix = 'calibration'

    def __init__(
        self,
        score_thr: float = 0.05,
        iou_thr: float = 0.5,
        bins: int = 10,
        collect_device: str = 'cpu',
        prefix: Optional[str] = None,
    ):
        super().__init__(collect_device, prefix)
        check_detection_calibration(score_thr, iou_thr, bins)
        self.score_thr, self.iou_thr, self.bins = score_thr, iou_thr, bins

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            found, truth, ignored = (
                {
                    key: value.cpu().numpy()
                    for key, value in sample[name].items()
                    if key in ('bboxes', 'labels', 'scores')
                }
                for name in ('pred_instances', 'gt_instances', 'ignored_instances')
            )
            pairs: List[Tuple[float, float]] = []  # of score and true positive
            for label in np.unique(found['labels']):
                mine = (found['labels'] == label) & (found['scores'] >= self.score_thr)
                detections = np.column_stack([found['bboxes'][mine], found['scores'][mine]])
                boxes, others = (part['bboxes'][part['labels'] == label] for part in (truth, ignored))
                right, wrong = tpfp_default(detections, boxes, others, self.iou_thr)
                counted = (right + wrong)[0] > 0
                pairs += zip(detections[counted, 4].tolist(), right[0][counted].tolist())
            self.results.append(pairs)  # one entry per image: mmengine drops what is beyond their number

    def compute_metrics(self, results: List[list]) -> Dict[str, float]:
        return detection_calibration([pair for image in results for pair in image], bins=self.bins)
