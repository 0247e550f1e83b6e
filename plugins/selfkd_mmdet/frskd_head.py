"""FRSKD for MMDetection's two-stage detectors with a feature pyramid."""

import copy
from typing import List

import torch
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.task_modules import SamplingResult
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from torch import Tensor, nn

from selfkd.losses import frskd_loss
from selfkd.pyramid import BiFPN

from .heads import check_region_loss

__all__ = ['FRSKDRoIHead']

POINTS = 4


@MODELS.register_module()
class FRSKDRoIHead(StandardRoIHead):
    """Feature refinement via self-knowledge distillation, for Faster and Mask R-CNN.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    In training a self-teacher refines the neck's maps with a two-way pyramid (:class:`selfkd.pyramid.BiFPN`, as many
    channels as the neck), classifies the sampled regions from the refined maps (average over 4 x 4 points and a linear
    layer), learns their labels, and teaches: its prediction of each region by the temperature KL, its refined maps
    by attention transfer to the neck's. Everything else is ``StandardRoIHead``'s, with the same parameter names, so the
    weights load into that head (``tools/publish_model.py`` drops the self-teacher). It is one option of a config::

        model = dict(roi_head=dict(type='selfkd_mmdet.FRSKDRoIHead'))

    Args:
        alpha: weight of the KL from the self-teacher's prediction. Those of the paper's classifiers (2, 100, T 4) are
            too large for a detector from scratch.
        beta: weight of the attention transfer; 0 for soft labels only.
        temperature: T.
        depth: separable convolutions per fusion in the self-teacher.
        repeats: passes of the self-teacher.
        kwargs: options of ``StandardRoIHead``.

    Losses beside the head's own: ``loss_teacher`` (the self-teacher on the labels, with the head's ``loss_cls``),
    ``loss_kd`` (averaged over the sampled regions), ``loss_feature``.

    Raises:
        ValueError: options out of range; a RoI extractor with less than two levels; regions that are not classified by
            a softmax.
    """

    def __init__(
        self,
        *args,
        alpha: float = 0.5,
        beta: float = 1.0,
        temperature: float = 1.0,
        depth: int = 1,
        repeats: int = 1,
        **kwargs,
    ):
        if not (alpha >= 0 and beta >= 0 and temperature > 0):
            raise ValueError(
                f'FRSKDRoIHead: alpha and beta must be at least 0 and temperature above 0, got {alpha}, {beta}, '
                f'{temperature}'
            )
        super().__init__(*args, **kwargs)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        levels = getattr(getattr(self, 'bbox_roi_extractor', None), 'num_inputs', 0)
        if levels < 2 or self.with_shared_head:
            raise ValueError(
                f'FRSKDRoIHead: regions are read from {levels} level(s), but the self-teacher refines a pyramid of two '
                'or more: use a detector with a neck (FPN), or PSKDHook or CSKDHook'
            )
        check_region_loss('FRSKDRoIHead', self.bbox_head)
        channels = [self.bbox_roi_extractor.out_channels] * levels
        # All that is for training only is in here: what tools/publish_model.py drops. Its weights are drawn from a copy
        # of the random state, so that the detector itself starts as it would without it.
        with torch.random.fork_rng(devices=[]):
            self.self_teacher = nn.ModuleDict(
                {
                    'pyramid': BiFPN(channels, channels, depth=depth, repeats=repeats),
                    # It averages over a region: POINTS x POINTS samples do, and cost a third of the usual ones.
                    'roi_extractor': MODELS.build(
                        {
                            **kwargs['bbox_roi_extractor'],
                            'roi_layer': dict(type='RoIAlign', output_size=POINTS, sampling_ratio=1),
                        }
                    ),
                    'bbox_head': BBoxHead(
                        with_avg_pool=True,
                        with_reg=False,
                        roi_feat_size=POINTS,
                        in_channels=channels[0],
                        num_classes=self.bbox_head.num_classes,
                    ),
                }
            )
            self.self_teacher['bbox_head'].loss_cls = copy.deepcopy(self.bbox_head.loss_cls)

    def bbox_loss(self, x: List[Tensor], sampling_results: List[SamplingResult]) -> dict:
        """As ``StandardRoIHead``'s, with the self-teacher's losses beside."""
        results = super().bbox_loss(x, sampling_results)
        rois = bbox2roi([result.priors for result in sampling_results])
        if len(rois) == 0:
            return results
        feats = x[: self.bbox_roi_extractor.num_inputs]
        refined = self.self_teacher['pyramid'](feats)
        teacher = self.self_teacher['bbox_head']
        logits, _ = teacher(self.self_teacher['roi_extractor'](refined, rois))
        own = teacher.loss_and_target(logits, None, rois, sampling_results, self.train_cfg)
        results['loss_bbox'].update(
            loss_teacher=own['loss_bbox']['loss_cls'],
            **frskd_loss(
                results['cls_score'],
                logits,
                feats,
                refined,
                None,
                alpha=self.alpha,
                beta=self.beta,
                temperature=self.temperature,
            ),
        )
        return results
