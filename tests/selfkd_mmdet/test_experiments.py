"""The experiments on detectors, on a few images."""

import itertools
import re

import numpy as np
import pytest
from helpers import ROOT

import selfkd_mmdet.pskd_hook as pskd_hook


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import make_toy_data

    make_toy_data.voc(tmp_path / 'VOCdevkit', train_size=4, test_size=2)
    return str(tmp_path)


@pytest.mark.parametrize('method', ['PS-KD 0.8, in the focal loss', 'PS-KD 0.8, a loss of its own'])
def test_a_run_trains_with_the_term_that_it_names_and_measures_itself(folder, monkeypatch, method):
    import detector
    import experiments

    calls = {'quality_focal_loss': 0, 'score_loss': 0}

    def counted(name, real):
        def call(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    for name in calls:
        monkeypatch.setattr(pskd_hook, name, counted(name, getattr(pskd_hook, name)))
    experiment = experiments.EXPERIMENTS['one-stage']
    settings = {**experiment.settings, **experiment.methods[method]}
    short = {'train_cfg.max_epochs': 2, 'train_cfg.val_interval': 2, 'train_dataloader.batch_size': 2}
    settings['options'] = {**settings['options'], **short}
    found = [detector.run(folder, settings, seed)['measures']['last'] for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert [measures['seed'] for measures in found] == [1, 1, 2]  # each read its own folder's log
    # After four steps it finds nothing, so there is no ECE.
    assert {'pascal_voc/mAP', 'calibration/detections'} <= set(found[0])
    # Of the two steps of the second epoch, level by level in the focal loss.
    assert calls['score_loss'] == (6 if 'own' in method else 0)
    assert (calls['quality_focal_loss'] > 0) == ('focal' in method)


@pytest.mark.parametrize('method', ['PS-KD 0.8', 'CS-KD'])
def test_blood_cells(folder, monkeypatch, tmp_path, method):
    """BCCD's layout: that of VOC, without a year, and with three classes."""
    import bccd
    import evidence
    import experiments

    with pytest.raises(FileNotFoundError, match='git clone https://github.com/Shenggan/BCCD_Dataset'):
        bccd.prepare(folder)
    (tmp_path / 'VOCdevkit/VOC2007').rename(tmp_path / 'BCCD')
    kinds = itertools.cycle(['RBC', 'WBC', 'Platelets'])
    for path in (tmp_path / 'BCCD/Annotations').iterdir():
        path.write_text(re.sub('<name>.*?</name>', lambda name: f'<name>{next(kinds)}</name>', path.read_text()))
    experiment = experiments.EXPERIMENTS['bccd']
    settings = {**experiment.settings, **experiment.methods[method]}
    short = {'train_cfg.max_epochs': 2, 'train_cfg.val_interval': 2, 'train_dataloader.batch_size': 2}
    settings['options'] = {**settings.get('options', {}), **short}
    measures = bccd.run(folder, settings, 3)['measures']['last']
    assert set(measures) >= {key for key, *_ in evidence.EXPERIMENTS['bccd'].values()} - {'calibration/ece'}
    assert measures['seed'] == 3


def test_precision_of_each_class(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import bccd

    metric = bccd.APByClass(eval_mode='area')
    metric.dataset_meta = dict(classes=('RBC', 'WBC'))
    boxes, none = np.array([[0.0, 0, 10, 10], [20, 20, 40, 40]]), np.zeros((0, 5))
    truth = dict(bboxes=boxes, labels=np.array([0, 1]), bboxes_ignore=none[:, :4], labels_ignore=none[:, 0])
    found = metric.compute_metrics([(truth, [np.append(boxes[:1], [[0.9]], 1), none])])  # finds the first one only
    assert (found['AP50_RBC'], found['AP50_WBC'], found['mAP']) == (1.0, 0.0, 0.5)
