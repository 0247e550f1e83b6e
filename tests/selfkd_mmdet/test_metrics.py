"""Calibration of detections."""

import pytest
import torch
from helpers.mmdet import config
from helpers.mmengine import train

from selfkd.cli import main
from selfkd.comparison import read_runs
from selfkd_mmdet import DetectionCalibration

BOX, APART, DIFFICULT = [0.0, 0, 10, 10], [50.0, 50, 60, 60], [20.0, 20, 30, 30]


def sample(*detections):
    """An image with one object of class 0, a difficult one of class 0; detections are (box, score, class)."""
    boxes, scores, labels = zip(*detections) if detections else ((), (), ())
    truth, ignored = (dict(bboxes=torch.tensor([b]), labels=torch.zeros(1, dtype=torch.long)) for b in (BOX, DIFFICULT))
    found = dict(
        bboxes=torch.tensor(boxes).reshape(-1, 4), scores=torch.tensor(scores), labels=torch.tensor(labels).long()
    )
    return dict(gt_instances=truth, ignored_instances=ignored, pred_instances=found)


def evaluate(*samples, **options):
    metric = DetectionCalibration(**options)
    metric.process(None, list(samples))
    return metric.evaluate(size=len(samples))


def test_hand_worked_error():
    """Right at 0.95; wrong: again at 0.85, another class at 0.45, elsewhere at 0.65 and 0.35; the rest is left out."""
    first = sample((BOX, 0.95, 0), (BOX, 0.85, 0), (BOX, 0.45, 1), (DIFFICULT, 0.75, 0), (APART, 0.04, 0))
    second = sample((APART, 0.65, 0), (APART, 0.35, 0))
    found = evaluate(first, second, sample())
    assert found['calibration/detections'] == 5
    assert found['calibration/ece'] == pytest.approx(100 * (0.05 + 0.85 + 0.45 + 0.65 + 0.35) / 5, rel=1e-5)
    # In one bin errors cancel: 1 right of 5, mean score 0.65.
    assert evaluate(first, second, bins=1)['calibration/ece'] == pytest.approx(100 * (0.65 - 0.2), rel=1e-5)
    assert evaluate(first, score_thr=0.9)['calibration/ece'] == pytest.approx(5, rel=1e-5)
    empty = evaluate(sample())
    assert empty['calibration/ece'] != empty['calibration/ece']  # NaN
    with pytest.raises(ValueError, match='score_thr must lie'):
        DetectionCalibration(score_thr=1.0)


def test_in_a_real_validation_and_compared(voc, tmp_path, capsys):
    runner = train(config(voc, tmp_path / 'run', **{'train_cfg.max_epochs': 1, 'model.test_cfg.rcnn.score_thr': 0.0}))
    found = runner.val()
    assert {'pascal_voc/mAP', 'calibration/ece', 'calibration/detections'} <= found.keys()
    assert 0 <= found['calibration/ece'] <= 100
    main(['compare', str(tmp_path / 'table'), f'x={tmp_path}/run', f'y={tmp_path}/run'])
    assert 'pascal_voc/mAP' in capsys.readouterr().out
    logged = read_runs(str(tmp_path / 'table/runs.csv'))['']['y'][0]
    assert {name: logged[name] for name in found} == pytest.approx(found, rel=1e-3, abs=1e-3, nan_ok=True)
