"""The measures against closed forms and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from selfkd.metrics import (
    apply_temperature,
    aurc,
    brier,
    calibration_error,
    confidence_of,
    excess_aurc,
    fit_temperature,
    nll,
    ood_scores,
    recall_at_1,
    risk_coverage,
)


def draw(n=300, c=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, generator=generator) * 2
    return logits.softmax(1), torch.randint(c, (n,), generator=generator)


def loop_ece(probs, labels, bins):
    """Bin by bin, (lo, hi], as PS-KD's released code counts."""
    confidence, predicted = probs.double().max(1)
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            accuracy = (predicted == labels)[inside].double().mean()
            total += inside.double().mean().item() * abs(accuracy - confidence[inside].mean()).item()
    return total


@pytest.mark.parametrize('bins', [1, 10, 15])
def test_calibration_error_equals_the_loop_over_bins(bins):
    probs, labels = draw()
    assert calibration_error(probs, labels, bins=bins) == pytest.approx(loop_ece(probs, labels, bins), abs=1e-12)


@pytest.mark.parametrize('bins', [5, 10, 15])
def test_measures_equal_torchmetrics(bins):
    """Its bins are [lo, hi) where ours are (lo, hi]: no drawn confidence lies on an edge."""
    functional = pytest.importorskip('torchmetrics.functional.classification')
    probs, labels = draw()
    ours = calibration_error(probs, labels, bins=bins)
    theirs = functional.multiclass_calibration_error(probs, labels, num_classes=5, n_bins=bins, norm='l1')
    assert ours == pytest.approx(theirs.item(), abs=1e-6)
    confidence, correct = confidence_of(probs, labels)
    auroc = functional.binary_auroc(confidence, correct.long())
    assert auroc.item() == pytest.approx(
        ood_scores(confidence[correct == 1][:, None], confidence[correct == 0][:, None])['auroc'], abs=1e-6
    )


def test_confidence_on_an_edge_belongs_to_the_lower_bin():
    probs = torch.tensor([[0.7, 0.3], [0.75, 0.25]], dtype=torch.float64)
    # One bin each if 0.7 falls into (0.6, 0.7]; together they would cancel to |0.5 - 0.725|.
    assert calibration_error(probs, torch.tensor([0, 1])) == pytest.approx((0.3 + 0.75) / 2)


def test_nll_and_brier_equal_scikit_learn():
    probs, labels = draw()
    assert nll(probs, labels) == pytest.approx(log_loss(labels, probs.double().numpy()), rel=1e-5)
    binary, truth = draw(c=2)
    assert brier(binary, truth) == pytest.approx(2 * brier_score_loss(truth, binary[:, 1].numpy()), rel=1e-5)
    assert math.isfinite(nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])))


def test_aurc_by_hand():
    """Confidence order: right, wrong, right. Risks 0, 1/2, 1/3; the best order has risks 0, 0, 1/3."""
    probs, labels = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), torch.tensor([0, 1, 0])
    torch.testing.assert_close(risk_coverage(probs, labels), torch.tensor([0, 1 / 2, 1 / 3], dtype=torch.float64))
    assert aurc(probs, labels) == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert excess_aurc(probs, labels) == pytest.approx(1 / 6)
    assert excess_aurc(probs, torch.tensor([0, 0, 1])) == pytest.approx(0)


def test_ood_scores_equal_scikit_learn_and_a_scan_over_thresholds():
    inside, outside = draw(200, seed=1)[0], draw(150, seed=2)[0].pow(0.3)
    outside = outside / outside.sum(1, keepdim=True)
    scores = ood_scores(inside, outside)
    score = np.concatenate([inside.amax(1).numpy(), outside.amax(1).numpy()]).astype(np.float64)
    truth = np.r_[np.ones(200), np.zeros(150)]
    assert scores['auroc'] == pytest.approx(roc_auc_score(truth, score))
    assert scores['aupr'] == pytest.approx(average_precision_score(truth, score))
    accepted = [(score[truth == 0] >= t).mean() for t in score if (score[truth == 1] >= t).mean() >= 0.95]
    assert scores['fpr95'] == pytest.approx(min(accepted))


def test_recall_at_1_equals_nearest_neighbours():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(70, 6, generator=generator), torch.randint(3, (70,), generator=generator)
    neighbours = NearestNeighbors(n_neighbors=2).fit(features.numpy()).kneighbors(return_distance=True)[1]
    nearest = [row[row != i][0] for i, row in enumerate(neighbours)]
    expected = (labels[nearest] == labels).double().mean().item()
    assert recall_at_1(features, labels) == pytest.approx(expected)
    assert recall_at_1(features, labels, chunk=16) == pytest.approx(expected)


def test_recall_at_1_does_not_depend_on_where_the_origin_is():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (60,), generator=generator)
    features = torch.nn.functional.one_hot(labels, 8) + 0.3 * torch.randn(60, 8, generator=generator)
    expected = recall_at_1(features, labels)
    assert expected > 0.6
    assert recall_at_1(features + 1e4, labels) == pytest.approx(expected, abs=0.02)
    assert recall_at_1(features.double() + 1e8, labels) == expected  # float64 stays float64


@pytest.mark.parametrize('function', [calibration_error, nll, brier, aurc, excess_aurc])
def test_inputs_are_checked(function):
    probs, labels = draw(4)
    with pytest.raises(ValueError, match=r'probs: must be floating, \[N, C\] with labels \[N\]'):
        function(probs, labels[:3])
    with pytest.raises(ValueError, match=r'probs: holds values that are not finite'):
        function(probs * float('nan'), labels)
    with pytest.raises(ValueError, match=r'probs: .* sum to 1 .* \(logits instead of probabilities\?\)'):
        function(probs.log(), labels)
    for label in (-1, 5):
        with pytest.raises(ValueError, match=r'labels: must be classes, in \[0, 5\), got values from .*leave samples'):
            function(probs, torch.full_like(labels, label))


@pytest.mark.parametrize('sharpness', [0.3, 1.0, 3.0])
def test_fitted_temperature_is_the_best_of_a_fine_grid(sharpness):
    """Labels drawn from softmax(z), logits z x sharpness: the answer lies near the sharpness."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(2000, 5, generator=generator)
    labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    found = fit_temperature(sharpness * logits, labels)
    grid = np.geomspace(0.1, 10, 4001)  # steps of 0.12 %
    losses = [torch.nn.functional.cross_entropy(sharpness * logits / t, labels).item() for t in grid]
    assert found == pytest.approx(grid[np.argmin(losses)], rel=0.003)
    assert found == pytest.approx(sharpness, rel=0.1)


def test_temperature_of_log_probabilities_is_that_of_logits_and_moves_no_decision():
    probs, _ = draw()
    labels = probs.sqrt().multinomial(1, generator=torch.Generator().manual_seed(2))[:, 0]  # T is about 2
    logits = probs.log() + 7.5  # a constant added to all logits of a sample changes nothing
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(fit_temperature(probs.log(), labels), rel=1e-5)
    assert temperature == pytest.approx(2, rel=0.2)
    scaled = apply_temperature(probs, temperature)
    assert torch.allclose(scaled, (logits / temperature).softmax(1), atol=1e-6)
    assert torch.equal(scaled.argmax(1), probs.argmax(1))
    assert nll(scaled, labels) < nll(probs, labels)
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # a probability of 0 in float32
    assert torch.isfinite(apply_temperature(certain, 5.0)).all()


def test_temperature_without_a_minimum_is_a_bound():
    logits = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert fit_temperature(logits, torch.tensor([0, 0])) == pytest.approx(0.05)  # no errors: the sharper the better
    assert fit_temperature(logits, torch.tensor([1, 1])) == pytest.approx(20)
    with pytest.raises(ValueError, match=r'labels: must be classes, in \[0, 2\), got values from -1 to 1'):
        fit_temperature(logits, torch.tensor([-1, 1]))
    with pytest.raises(ValueError, match='logits: holds values that are not finite'):
        fit_temperature(logits.log(), torch.tensor([0, 0]))
