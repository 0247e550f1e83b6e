"""Calibration, ranking by confidence, out-of-distribution detection and retrieval as evaluation metrics.

Values have the units of the papers' tables: ECE in percent, AURC and E-AURC x 1000, the rest as selfkd.metrics gives
them. Except for RecallAt1 they keep a few numbers a sample, not its probabilities.
"""

from typing import Any, Dict, List, Optional, Sequence

import torch
from mmcv.transforms import BaseTransform
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS, METRICS, TRANSFORMS

from selfkd import metrics
from selfkd_mmengine import unwrap

__all__ = ['CalibrationMetric', 'KeepFeaturesHook', 'MarkOOD', 'OODMetric', 'RecallAt1', 'SelectiveMetric']


@METRICS.register_module()
class CalibrationMetric(BaseMetric):
    """Expected calibration error (``ece``, in percent), negative log-likelihood (``nll``) and Brier score (``brier``).

    Args:
        bins: equal bins of the top confidence for the ECE. Defaults to 10, PS-KD's.
        collect_device, prefix: as in mmengine's metrics.
    """

    default_prefix = 'calibration'

    def __init__(self, bins: int = 10, collect_device: str = 'cpu', prefix: Optional[str] = None):
        super().__init__(collect_device, prefix)
        if bins < 1:
            raise ValueError(f'CalibrationMetric: bins must be at least 1, got {bins}')
        self.bins = bins

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            probs, label = _probs(sample, self), sample['gt_label'].cpu()
            confidence, correct = metrics.confidence_of(probs, label)
            values = confidence.item(), correct.item(), metrics.nll(probs, label), metrics.brier(probs, label)
            self.results.append(values)

    def compute_metrics(self, results: List[tuple]) -> Dict[str, float]:
        confidence, correct, nll, brier = torch.tensor(results, dtype=torch.float64).T
        ece = metrics.calibration_error_of(confidence, correct, bins=self.bins)
        return {'ece': 100 * ece, 'nll': nll.mean().item(), 'brier': brier.mean().item()}


@METRICS.register_module()
class SelectiveMetric(BaseMetric):
    """Area under the risk-coverage curve (``aurc``) and its excess over the best ordering (``e_aurc``), x 1000."""

    default_prefix = 'selective'

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            confidence, correct = metrics.confidence_of(_probs(sample, self), sample['gt_label'].cpu())
            self.results.append((confidence.item(), correct.item()))

    def compute_metrics(self, results: List[tuple]) -> Dict[str, float]:
        risks = metrics.risk_coverage_of(*torch.tensor(results, dtype=torch.float64).T)
        return {'aurc': 1000 * risks.mean().item(), 'e_aurc': 1000 * metrics.excess_of(risks)}


@METRICS.register_module()
class OODMetric(BaseMetric):
    """How well the confidence tells the test set from samples of other data: ``auroc``, ``aupr``, ``fpr95``.

    The loader yields both: a ConcatDataset, in whose out-of-distribution part the pipeline has a [`MarkOOD`][]. Use
    a test run of its own for it: other metrics would count the marked samples as errors. See docs/metrics.md.
    """

    default_prefix = 'ood'

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            self.results.append((_probs(sample, self).max().item(), int(sample['gt_label'].item() < 0)))

    def compute_metrics(self, results: List[tuple]) -> Dict[str, float]:
        confidence, ood = torch.tensor(results, dtype=torch.float64).T
        if ood.min() == ood.max():
            kind = 'out-of-distribution' if ood[0] == 0 else 'in-distribution'
            raise ValueError(
                f'OODMetric: the loader has no {kind} samples. Concatenate both data sets, '
                "with dict(type='selfkd_mmpretrain.MarkOOD') in the pipeline of the out-of-distribution one"
            )
        return metrics.ood_scores(confidence[ood == 0][:, None], confidence[ood == 1][:, None])


@TRANSFORMS.register_module()
class MarkOOD(BaseTransform):
    """Marks a sample as out-of-distribution, for [`OODMetric`][]: its label becomes -1. Put it before PackInputs."""

    def transform(self, results: dict) -> dict:
        results['gt_label'] = -1
        return results


@METRICS.register_module()
class RecallAt1(BaseMetric):
    """Share of samples whose nearest other sample in feature space has their class, as ``recall/at_1``.

    Needs the features beside the predictions::

        default_hooks = dict(features=dict(type='selfkd_mmpretrain.KeepFeaturesHook'))
    """

    default_prefix = 'recall'

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            if 'feature' not in sample:
                raise ValueError(
                    'RecallAt1: the predictions carry no features: '
                    "add dict(type='selfkd_mmpretrain.KeepFeaturesHook') to default_hooks, under a name of your own"
                )
            self.results.append((sample['feature'].cpu(), int(sample['gt_label'])))

    def compute_metrics(self, results: List[tuple]) -> Dict[str, float]:
        features, labels = zip(*results)
        return {'at_1': metrics.recall_at_1(torch.stack(features), torch.tensor(labels))}


@HOOKS.register_module()
class KeepFeaturesHook(Hook):
    """Puts the input of the classifier, ``head.fc``, into each prediction as ``feature``, for [`RecallAt1`][]."""

    def before_val(self, runner: Runner) -> None:
        head: Any = getattr(unwrap(runner.model), 'head', None)
        if not hasattr(head, 'fc'):
            raise ValueError(f'KeepFeaturesHook: needs a head with a linear classifier `fc`, got {type(head).__name__}')
        self._handles = [
            head.fc.register_forward_pre_hook(self._keep),
            unwrap(runner.model).register_forward_hook(self._attach, with_kwargs=True),
        ]

    def _keep(self, module, args) -> None:
        self._features = args[0].detach()

    def _attach(self, model, args, kwargs, output) -> None:
        if kwargs.get('mode') == 'predict':
            for sample, feature in zip(output, self._features.float()):
                sample.set_field(feature, 'feature')

    def after_val(self, runner: Runner) -> None:
        for handle in self._handles:
            handle.remove()

    before_test, after_test = before_val, after_val


def _probs(sample: dict, metric: BaseMetric) -> torch.Tensor:
    """``[1, C]`` on the CPU."""
    if 'pred_score' not in sample or 'gt_label' not in sample:
        raise ValueError(f'{type(metric).__name__}: needs pred_score and gt_label, got {sorted(sample)}')
    return sample['pred_score'].cpu().float()[None]
