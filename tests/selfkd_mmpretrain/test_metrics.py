"""The measures as MMPretrain metrics: against scikit-learn and the core, in real evaluation loops."""

import numpy as np
import pytest
import torch
from helpers.mmengine import digits_config, train_in_processes
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from selfkd import metrics as core
from selfkd_mmpretrain.metrics import CalibrationMetric, OODMetric, RecallAt1, SelectiveMetric
from selfkd_mmpretrain.report import Predictions, plot_reliability

ALL = [dict(type='Accuracy', topk=(1, 5)), dict(type='selfkd_mmpretrain.CalibrationMetric')]
ALL += [dict(type='selfkd_mmpretrain.SelectiveMetric'), dict(type='selfkd_mmpretrain.RecallAt1')]
FEATURES = dict(type='selfkd_mmpretrain.KeepFeaturesHook')


def samples(n=200, c=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    probs = (torch.randn(n, c, generator=g) * 2).softmax(1)
    labels = torch.randint(0, c, (n,), generator=g)
    return probs, labels, [dict(pred_score=p, gt_label=y[None]) for p, y in zip(probs, labels)]


def evaluate(metric, data_samples):
    for i in range(0, len(data_samples), 7):
        metric.process(None, data_samples[i : i + 7])
    return metric.evaluate(len(data_samples))


def test_calibration_equals_the_core_and_scikit_learn():
    probs, labels, data = samples()
    out = evaluate(CalibrationMetric(), data)
    assert out['calibration/nll'] == pytest.approx(log_loss(labels, probs.double()), rel=1e-6)
    onehot = np.eye(5)[labels]
    assert out['calibration/brier'] == pytest.approx(((probs.numpy() - onehot) ** 2).sum(1).mean(), rel=1e-5)
    assert out['calibration/ece'] == pytest.approx(100 * core.calibration_error(probs, labels))
    wide = evaluate(CalibrationMetric(bins=3), data)
    assert wide['calibration/ece'] == pytest.approx(100 * core.calibration_error(probs, labels, bins=3))


def test_selective_equals_the_core():
    probs, labels, data = samples(seed=1)
    out = evaluate(SelectiveMetric(), data)
    assert out['selective/aurc'] == pytest.approx(1000 * core.aurc(probs, labels))
    assert out['selective/e_aurc'] == pytest.approx(1000 * core.excess_aurc(probs, labels))


def test_ood_equals_scikit_learn():
    probs, _, data = samples(seed=2)
    ood = [dict(pred_score=(3 * p).softmax(0), gt_label=torch.tensor([-1])) for p in probs[:80]]
    out = evaluate(OODMetric(), data + ood)
    score = torch.cat([probs.amax(1), (3 * probs[:80]).softmax(1).amax(1)])
    inside = torch.arange(280) < 200
    assert out['ood/auroc'] == pytest.approx(roc_auc_score(inside, score))
    assert out['ood/aupr'] == pytest.approx(average_precision_score(inside, score))
    with pytest.raises(ValueError, match='no out-of-distribution samples. Concatenate both'):
        evaluate(OODMetric(), data)


def test_recall_equals_scikit_learn():
    features, labels = torch.randn(60, 4), torch.randint(0, 3, (60,))
    out = evaluate(RecallAt1(), [dict(feature=f, gt_label=y[None]) for f, y in zip(features, labels)])
    nearest = NearestNeighbors(n_neighbors=2).fit(features).kneighbors(features, return_distance=False)[:, 1]
    assert out['recall/at_1'] == pytest.approx((labels[nearest] == labels).float().mean().item())
    with pytest.raises(ValueError, match='add dict'):
        evaluate(RecallAt1(), samples()[2])


def test_metrics_keep_a_few_numbers_a_sample():
    _, _, data = samples(c=1000)
    for metric in (CalibrationMetric(), SelectiveMetric(), OODMetric()):
        metric.process(None, data)
        assert len(metric.results[0]) <= 4
        assert all(isinstance(v, (float, int)) for v in metric.results[0])


def evaluation_config(digits, tmp_path, *hooks, ood=False):
    cfg = digits_config(digits, tmp_path, *hooks)
    cfg.val_dataloader.dataset.indices = 101
    if ood:
        inside = cfg.val_dataloader.dataset
        outside = ConfigDict(inside.to_dict())
        outside.pipeline.insert(1, dict(type='selfkd_mmpretrain.MarkOOD'))
        outside.indices = 40
        cfg.val_dataloader.dataset = ConfigDict(type='ConcatDataset', datasets=[inside, outside])
    cfg.val_evaluator = [dict(type='selfkd_mmpretrain.OODMetric')] if ood else ALL
    return cfg


def test_in_an_evaluation_loop(digits, tmp_path):
    runner = Runner.from_cfg(evaluation_config(digits, tmp_path, FEATURES))
    out = runner.val()
    predictions = []
    with torch.no_grad():
        for batch in runner.val_dataloader:
            predictions += runner.model.val_step(batch)
    probs, labels = (
        torch.stack([p.pred_score for p in predictions]),
        torch.cat([p.gt_label for p in predictions]),
    )
    assert out['calibration/nll'] == pytest.approx(core.nll(probs, labels), rel=1e-5)
    assert out['selective/aurc'] == pytest.approx(1000 * core.aurc(probs, labels), rel=1e-5)
    with torch.no_grad():
        inputs = torch.stack([runner.val_dataloader.dataset[i]['inputs'] for i in range(101)])
        features = runner.model.extract_feat(runner.model.data_preprocessor({'inputs': inputs})['inputs'])[-1]
    assert out['recall/at_1'] == pytest.approx(core.recall_at_1(features, labels))
    assert 'feature' not in predictions[0]  # kept only while the evaluation ran


def test_ood_loader(digits, tmp_path):
    """The same images on both sides: nothing tells them apart."""
    out = Runner.from_cfg(evaluation_config(digits, tmp_path, ood=True)).val()
    assert out['ood/auroc'] == pytest.approx(0.5, abs=0.15)
    assert 0 < out['ood/fpr95'] <= 1


def test_two_processes_measure_what_one_does(digits, tmp_path):
    cfg = evaluation_config(digits, tmp_path / 'run', FEATURES)
    cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval, cfg.optim_wrapper.optimizer.lr = 1, 1, 0.0
    cfg.train_dataloader.dataset.indices, cfg.log_level = 8, 'INFO'
    cfg.model.backbone.norm_eval = True  # nothing changes in training: both runs measure the initial model
    values = []
    for processes in (1, 2):
        output = train_in_processes(cfg, tmp_path, processes)
        lines = [line for line in output.splitlines() if 'calibration/ece' in line]
        values.append(lines[-1].split('accuracy/top1')[1].split('data_time')[0])
    assert values[0] == values[1]


def test_the_reliability_diagram_has_the_bins_of_its_ece(tmp_path, monkeypatch):
    """In float32 0.3 is above 0.3, and 10 times it is 3."""
    confidence = torch.tensor([0.3, 0.35]).repeat(10)
    probs = torch.stack([confidence, *[(1 - confidence) / 3] * 3], dim=1)
    labels = torch.tensor([0, 1]).repeat(10)
    drawn = []
    monkeypatch.setattr('matplotlib.axes.Axes.plot', lambda ax, xs, ys, **style: drawn.append((xs, ys, style)))
    monkeypatch.setattr('matplotlib.axes.Axes.legend', lambda ax, **style: None)
    plot_reliability({'': {'plain': [Predictions(probs, labels)]}}, str(tmp_path / 'plot.png'))
    (x,), (y,), style = next((*xy, style) for *xy, style in drawn if 'label' in style)
    assert abs(y - x) == pytest.approx(core.calibration_error(probs, labels))
    assert style['label'] == f'plain (ECE {100 * abs(y - x):.1f} %)'
