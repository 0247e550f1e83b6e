"""Measures of calibration, ranking by confidence, out-of-distribution detection and retrieval.

``probs`` are class probabilities ``[N, C]``, ``labels`` class ids ``[N]``, on any device; results are Python floats in
the natural unit (a share, not a percentage). The papers' tables show ECE x 100 and AURC, E-AURC x 1000. It is a
ValueError where ``probs`` hold logits, or a label is no class (-1); on the CPU, where looking is free.
"""

import math
from typing import Dict, Sequence, Tuple

import torch
from torch import Tensor

from .checks import check_probs, free_to_look, positive, wide

__all__ = [
    'apply_temperature',
    'aurc',
    'brier',
    'calibration_error',
    'calibration_error_of',
    'calibration_gaps',
    'check_detection_calibration',
    'confidence_bins',
    'confidence_of',
    'detection_calibration',
    'excess_aurc',
    'fit_temperature',
    'nll',
    'ood_scores',
    'recall_at_1',
    'risk_coverage',
]


def calibration_error(probs: Tensor, labels: Tensor, *, bins: int = 10) -> float:
    r"""Expected calibration error, :math:`\sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|`.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3
    https://arxiv.org/abs/1706.04599
    Bins are equal intervals ``(lo, hi]`` of the top confidence, as in PS-KD's released code.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
        >>> round(calibration_error(probs, torch.tensor([0, 1])), 4)  # right half of the time, sure of 0.9
        0.4
    """
    return calibration_error_of(*confidence_of(probs, labels), bins=bins)


def calibration_error_of(confidence: Tensor, correct: Tensor, *, bins: int = 10) -> float:
    """[`calibration_error`][] from what [`confidence_of`][] gives."""
    return calibration_gaps(confidence, correct, bins=bins).abs().sum().item() / len(confidence)


def calibration_gaps(confidence: Tensor, correct: Tensor, *, bins: int = 10) -> Tensor:
    """What [`calibration_error`][] is made of: the sum of (correct - confidence) over the samples of each bin.

    Those of several batches or processes may be added up: ECE is the sum of the absolute values by the number of
    samples. Takes what [`confidence_of`][] gives.

    Returns:
        float64 ``[bins]``, on the device of ``confidence``.
    """
    which = confidence_bins(confidence, bins)
    gaps = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    return gaps.index_add_(0, which, correct - confidence)


def confidence_bins(confidence: Tensor, bins: int) -> Tensor:
    """The bin of each sample, from 0: of equal intervals ``(lo, hi]``, 0 itself is in the first.

    Example:
        >>> confidence_bins(torch.tensor([0.0, 0.1, 0.11, 1.0], dtype=torch.float64), 10)
        tensor([0, 0, 1, 9])
    """
    if bins < 1:
        raise ValueError(f'bins: must be at least 1, got {bins}')
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    return torch.bucketize(confidence, edges[1:-1])


def check_detection_calibration(score_thr: float, iou_thr: float, bins: int) -> None:
    """ValueError: settings of the detectors' ``DetectionCalibration`` that are out of range."""
    if not (0 <= score_thr < 1 and 0 < iou_thr < 1 and bins >= 1):
        raise ValueError(
            'DetectionCalibration: score_thr must lie in [0, 1), iou_thr in (0, 1) and bins must be at least 1, '
            f'got {score_thr}, {iou_thr}, {bins}'
        )


def detection_calibration(detections: Sequence[Tuple[float, float]], *, bins: int) -> Dict[str, float]:
    """What the detectors' ``DetectionCalibration`` reports, of the score of each detection and whether it is right."""
    if not detections:
        return {'ece': math.nan, 'detections': 0}
    scores, right = torch.tensor(detections, dtype=torch.float64).T
    return {'ece': 100 * calibration_error_of(scores, right, bins=bins), 'detections': len(detections)}


def nll(probs: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    _check_probs(probs, labels)
    picked = probs.double().gather(1, labels.long()[:, None])
    # A probability that underflowed to 0 counts as the smallest one its dtype can hold.
    return -picked.clamp(min=torch.finfo(probs.dtype).tiny).log().mean().item()


def fit_temperature(logits: Tensor, labels: Tensor, *, bounds: Tuple[float, float] = (0.05, 20.0)) -> float:
    r"""The temperature :math:`T` at which the NLL of :math:`\mathrm{softmax}(z / T)` is smallest.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2
    https://arxiv.org/abs/1706.04599
    Fit it on samples that were neither trained nor will be tested on.

    Args:
        logits: ``[N, C]``; log-probabilities do as well.
        labels: class ids ``[N]``.
        bounds: smallest and largest temperature. One of them is the answer where the NLL only falls towards it: the
            lower one if all samples are classified correctly, the upper one if the logits say nothing of the labels.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 4)
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 4)  # sigmoid(2 / T) = 3/4: T = 2 / ln 3
        1.8205
    """
    _check(logits, labels, 'logits')
    _check_classes(labels, logits.shape[1])
    logits, labels = logits.double(), labels.long()[:, None]
    logits = logits - logits.gather(1, labels)  # so that the slope has a sign, however small, where all are correct
    # In b = 1/T the NLL is convex: its slope, E[z], grows with b, and its own slope is the variance of z. Ten steps of
    # Newton's are nearly always enough; where they are not, or lead out of what is possible, log T is halved.
    low, high = 1 / bounds[1], 1 / bounds[0]
    inverse = min(max(1.0, low), high)
    for step in range(60):
        probs = (logits * inverse).softmax(1)
        expected = (probs * logits).sum(1, keepdim=True)
        slope, curvature = float(expected.mean()), float((probs * (logits - expected) ** 2).sum(1).mean())
        if abs(slope) < 1e-9 * curvature * inverse:
            break
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        newton = inverse - slope / curvature if curvature else low
        inverse = newton if low < newton < high and step < 10 else math.sqrt(low * high)
    return 1 / inverse


def apply_temperature(probs: Tensor, temperature: float) -> Tensor:
    r""":math:`\mathrm{softmax}(\log p / T)`, which is that of :math:`z / T` where p is the softmax of the logits z.

    Example:
        >>> apply_temperature(torch.tensor([[0.8, 0.2]]), 2.0)  # odds of 4 become odds of 2
        tensor([[0.6667, 0.3333]])
    """
    positive('apply_temperature', temperature=temperature)
    return (probs.clamp(min=torch.finfo(probs.dtype).tiny).log() / temperature).softmax(-1)


def brier(probs: Tensor, labels: Tensor) -> float:
    """Brier score, the mean over samples of the squared distance to the one-hot label, in [0, 2].

    Example:
        >>> brier(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        0.5
    """
    _check_probs(probs, labels)
    onehot = torch.zeros_like(probs, dtype=torch.float64).scatter_(1, labels.long()[:, None], 1)
    return (probs.double() - onehot).pow(2).sum(1).mean().item()


def aurc(probs: Tensor, labels: Tensor) -> float:
    """Area under the risk-coverage curve: the mean over n of the error rate among the n most confident samples.

    Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017
    https://arxiv.org/abs/1705.08500

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> aurc(probs, torch.tensor([0, 1]))  # error rates 0 at n=1, 1/2 at n=2
        0.25
    """
    return risk_coverage(probs, labels).mean().item()


def excess_aurc(probs: Tensor, labels: Tensor) -> float:
    """[`aurc`][] minus that of the best ordering with the same number of errors (all errors last), E-AURC.

    Geifman et al., "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019
    https://arxiv.org/abs/1805.08206
    """
    return excess_of(risk_coverage(probs, labels))


def excess_of(risks: Tensor) -> float:
    """[`excess_aurc`][] from what [`risk_coverage`][] gives."""
    n = len(risks)
    errors = round(risks[-1].item() * n)
    best = torch.zeros(n, dtype=torch.float64)
    best[n - errors :] = torch.arange(1, errors + 1, dtype=torch.float64)
    best /= torch.arange(1, n + 1, dtype=torch.float64)
    return risks.mean().item() - best.mean().item()


def risk_coverage(probs: Tensor, labels: Tensor) -> Tensor:
    """Error rate among the n most confident samples for n = 1..N: float64 ``[N]`` on the CPU.

    Samples of equal confidence keep their order.
    """
    return risk_coverage_of(*confidence_of(probs, labels))


def risk_coverage_of(confidence: Tensor, correct: Tensor) -> Tensor:
    """[`risk_coverage`][] from what [`confidence_of`][] gives."""
    order = confidence.sort(descending=True, stable=True).indices
    errors = (1 - correct)[order].cumsum(0).cpu()
    return errors / torch.arange(1, len(errors) + 1, dtype=torch.float64)


def ood_scores(id_probs: Tensor, ood_probs: Tensor) -> Dict[str, float]:
    """How well the top confidence tells in-distribution samples (the positives) from out-of-distribution ones.

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017
    https://arxiv.org/abs/1610.02136
    Needs scikit-learn (``pip install selfkd[metrics]``).

    Args:
        id_probs: ``[N, C]``.
        ood_probs: ``[M, C]``.

    Returns:
        ``auroc``, ``aupr`` (average precision) and ``fpr95``: the smallest share of out-of-distribution samples
        accepted at a threshold that accepts at least 95 % of the others.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    if id_probs.dim() != 2 or ood_probs.dim() != 2 or not len(id_probs) or not len(ood_probs):
        raise ValueError(
            f'id_probs, ood_probs: must be non-empty, [N, C] and [M, C], got {tuple(id_probs.shape)}, '
            f'{tuple(ood_probs.shape)}'
        )
    score = torch.cat([id_probs.amax(1), ood_probs.amax(1)]).double().cpu().numpy()
    positive = torch.cat([torch.ones(len(id_probs)), torch.zeros(len(ood_probs))]).numpy()
    fpr, tpr, _ = roc_curve(positive, score, drop_intermediate=False)
    return {
        'auroc': float(roc_auc_score(positive, score)),
        'aupr': float(average_precision_score(positive, score)),
        'fpr95': float(fpr[tpr >= 0.95].min()),
    }


def recall_at_1(features: Tensor, labels: Tensor, *, chunk: int = 1024) -> float:
    """Share of samples whose nearest other sample (Euclidean) has their class; ``features`` are ``[N, D]``.

    Example:
        >>> recall_at_1(torch.tensor([[0.0], [0.1], [5.0], [5.1]]), torch.tensor([0, 0, 1, 2]))
        0.5
    """
    _check(features, labels, 'features')
    if len(features) < 2:
        raise ValueError(f'features: needs at least 2 samples, got {len(features)}')
    features, hits = features.to(wide(features.dtype)), 0
    for start in range(0, len(features), chunk):
        # By differences: by a matrix product, features far from the origin would lose their digits.
        distance = torch.cdist(features[start : start + chunk], features, compute_mode='donot_use_mm_for_euclid_dist')
        rows = torch.arange(len(distance), device=features.device)
        distance[rows, rows + start] = float('inf')
        hits += int((labels[distance.argmin(1)] == labels[start : start + chunk]).sum())
    return hits / len(features)


def confidence_of(probs: Tensor, labels: Tensor):
    """Each sample's top probability, and whether that class is its label (1 or 0): float64 ``[N]`` both.

    Raises:
        ValueError: logits instead of probabilities, or labels that are no classes (looked for on the CPU).
    """
    _check_probs(probs, labels)
    confidence, predicted = probs.max(1)
    return confidence.double(), (predicted == labels).double()


def _check_probs(probs: Tensor, labels: Tensor) -> None:
    _check(probs, labels)
    check_probs('probs', probs, tuple(probs.shape))
    _check_classes(labels, probs.shape[1])


def _check_classes(labels: Tensor, num_classes: int) -> None:
    if free_to_look(labels):
        low, high = labels.aminmax()
        if low < 0 or high >= num_classes:
            raise ValueError(
                f'labels: must be classes, in [0, {num_classes}), got values from {low.item()} to {high.item()}: leave '
                'samples without a label (-1) out'
            )


def _check(values: Tensor, labels: Tensor, name: str = 'probs') -> None:
    if values.dim() != 2 or not values.is_floating_point() or labels.shape != values.shape[:1] or not len(values):
        raise ValueError(
            f'{name}: must be floating, [N, C] with labels [N] and N > 0, got {values.dtype}, {tuple(values.shape)} '
            f'and labels {tuple(labels.shape)}'
        )
    if not torch.isfinite(values).all():
        raise ValueError(f'{name}: holds values that are not finite')
