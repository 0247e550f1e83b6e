"""Calibration of pixels, measured by the Runner's own validation."""

import pytest
import torch
from helpers.mmengine import train
from helpers.mmseg import config

from selfkd.metrics import calibration_error
from selfkd_mmseg import PixelCalibrationMetric


def test_ece_over_all_pixels_that_are_not_ignored(voc, tmp_path):
    cfg = config(voc, tmp_path, **{'train_cfg.max_iters': 1})
    cfg.val_evaluator = [dict(type='selfkd_mmseg.PixelCalibrationMetric', bins=7)]
    runner = train(cfg)
    measured = runner.val()['calibration/ece']
    probs, labels = [], []
    for batch in runner.val_dataloader:
        with torch.no_grad():
            for sample in runner.model.eval().test_step(batch):
                label = sample.gt_sem_seg.data[0]
                probs.append(sample.seg_logits.data.softmax(0)[:, label != 255].T)
                labels.append(label[label != 255])
                assert (label == 255).any()
    assert len(probs) == 2
    expected = 100 * calibration_error(torch.cat(probs), torch.cat(labels), bins=7)
    assert measured == pytest.approx(expected, rel=1e-6)


def test_settings_and_models_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match='bins must be at least 1, got 0'):
        PixelCalibrationMetric(bins=0)
    label = torch.zeros(1, 2, 2, dtype=torch.long)
    sample = dict(seg_logits=dict(data=torch.zeros(1, 2, 2)), gt_sem_seg=dict(data=label))
    with pytest.raises(ValueError, match='needs two or more outputs'):
        PixelCalibrationMetric().process(None, [sample])
    sample['seg_logits']['data'], metric = torch.zeros(3, 2, 2), PixelCalibrationMetric()
    sample['gt_sem_seg']['data'] = torch.full_like(label, 255)
    metric.process(None, [sample])
    with pytest.raises(ValueError, match='every pixel of the test set is ignored'):
        metric.compute_metrics(metric.results)
