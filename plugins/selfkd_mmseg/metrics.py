"""Calibration of pixels as an evaluation metric."""

from typing import Dict, List, Optional, Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmseg.registry import METRICS

from selfkd.metrics import calibration_gaps, confidence_of

__all__ = ['PixelCalibrationMetric']


@METRICS.register_module()
class PixelCalibrationMetric(BaseMetric):
    """Expected calibration error over all pixels that are not ignored, ``calibration/ece``, in percent.

    Of an image it keeps a sum per bin, not its probabilities. For models that predict by a softmax over classes.

    Args:
        bins: equal bins of the top confidence. Defaults to 10, PS-KD's.
        ignore_index: the label of pixels that do not count.
        collect_device, prefix: as in mmengine's metrics.
    """

    default_prefix = 'calibration'

    def __init__(
        self, bins: int = 10, ignore_index: int = 255, collect_device: str = 'cpu', prefix: Optional[str] = None
    ):
        super().__init__(collect_device, prefix)
        if bins < 1:
            raise ValueError(f'PixelCalibrationMetric: bins must be at least 1, got {bins}')
        self.bins, self.ignore_index = bins, ignore_index

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            logits, label = sample['seg_logits']['data'].float(), sample['gt_sem_seg']['data'].squeeze(0)
            if len(logits) == 1:
                raise ValueError('PixelCalibrationMetric: needs two or more outputs (a softmax), but the model has 1')
            valid = label != self.ignore_index
            if valid.any():
                confidence, correct = confidence_of(logits[:, valid].softmax(0).T, label[valid].to(logits.device))
                gaps = calibration_gaps(confidence, correct, bins=self.bins)
                self.results.append((gaps.cpu(), len(confidence)))

    def compute_metrics(self, results: List[tuple]) -> Dict[str, float]:
        if not results:
            raise ValueError('PixelCalibrationMetric: every pixel of the test set is ignored')
        gaps, pixels = zip(*results)
        return {'ece': 100 * (torch.stack(gaps).sum(0).abs().sum() / sum(pixels)).item()}
