"""FRSKD for MMDetection's two-stage detectors with a feature pyramid."""

import torch
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from torch import nn

from selfkd.losses import frskd_loss
from selfkd.pyramid import BiFPN
from selfkd.checks import at_least_zero, positive

from .heads import check_region_loss, per_stage

__all__ = ['FRSKDCascadeRoIHead', 'FRSKDRoIHead']


class SelfTaught:
    """What a RoI head becomes with a self-teacher: one pyramid, and a classifier for each stage."""

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
        user = type(self).__name__
        at_least_zero(user, alpha=alpha, beta=beta)
        positive(user, temperature=temperature)
        if ('num_stages' in kwargs) != isinstance(self, CascadeRoIHead):
            raise ValueError(
                f'{user}: Cascade R-CNN takes FRSKDCascadeRoIHead, Faster and Mask R-CNN take FRSKDRoIHead '
                f'(num_stages is {"" if "num_stages" in kwargs else "not "}given)'
            )
        super().__init__(*args, **kwargs)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        extractor = per_stage(getattr(self, 'bbox_roi_extractor', None))[0]
        self.levels = getattr(extractor, 'num_inputs', 0)
        if self.levels < 2 or self.with_shared_head:
            raise ValueError(
                f'{user}: regions are read from {self.levels} level(s), but the self-teacher refines a pyramid of two '
                'or more: use a detector with a neck (FPN), or PSKDHook or CSKDHook'
            )
        for head in per_stage(self.bbox_head):
            check_region_loss(user, head)
        channels = [extractor.out_channels] * self.levels
        region, heads = per_stage(kwargs['bbox_roi_extractor'])[0], per_stage(kwargs['bbox_head'])
        if len(heads) == 1:  # given once for all stages
            heads *= len(per_stage(self.bbox_head))
        # All that is for training only is in here: what tools/publish_model.py drops. Its weights are drawn from a copy
        # of the random state, so that the detector itself starts as it would without it.
        with torch.random.fork_rng(devices=[]):
            self.self_teacher = nn.ModuleDict(
                {
                    'pyramid': BiFPN(channels, channels, depth=depth, repeats=repeats),
                    # One sample for each point: adaptive numbers of them cost several times as much.
                    'roi_extractor': MODELS.build(
                        {**region, 'roi_layer': {**region['roi_layer'], 'sampling_ratio': 1}}
                    ),
                    'bbox_head': nn.ModuleList(MODELS.build(_classifier(head)) for head in heads),
                }
            )

    def bbox_loss(self, *args) -> dict:
        results = super().bbox_loss(*args)
        self._classified.append((results['cls_score'], args[-1]))
        return results

    def loss(self, x, rpn_results_list, batch_data_samples) -> dict:
        """As the toolkit's, with the self-teacher's losses beside."""
        self._classified = []
        losses = super().loss(x, rpn_results_list, batch_data_samples)
        stages, self._classified = self._classified, []  # lets go of the graph
        feats, refined = x[: self.levels], None
        for stage, (logits, sampling_results) in enumerate(stages):
            rois = bbox2roi([result.priors for result in sampling_results])
            if len(rois) == 0:
                continue
            first = refined is None
            if first:
                refined = self.self_teacher['pyramid'](feats)
            teacher = self.self_teacher['bbox_head'][stage]
            teacher_logits, _ = teacher(self.self_teacher['roi_extractor'](refined, rois))
            train_cfg = per_stage(self.train_cfg)[stage]
            own = teacher.loss_and_target(teacher_logits, None, rois, sampling_results, train_cfg)
            terms = frskd_loss(
                logits,
                teacher_logits,
                feats,
                refined,
                None,
                alpha=self.alpha,
                beta=self.beta if first else 0.0,
                temperature=self.temperature,
            )
            if 'loss_feature' in terms:  # it is the maps', and no stage's
                losses['loss_feature'] = terms.pop('loss_feature')
            terms['loss_teacher'] = own['loss_bbox']['loss_cls']
            cascade = isinstance(self, CascadeRoIHead)
            prefix, weight = (f's{stage}.', self.stage_loss_weights[stage]) if cascade else ('', 1)
            losses.update({f'{prefix}{name}': weight * term for name, term in terms.items()})
        return losses


def _classifier(bbox_head: dict) -> dict:
    options = {key: value for key, value in bbox_head.items() if not key.startswith('num_reg_')}
    return {**options, 'with_reg': False}


@MODELS.register_module()
class FRSKDRoIHead(SelfTaught, StandardRoIHead):
    """Feature refinement via self-knowledge distillation, for Faster and Mask R-CNN.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    In training a self-teacher refines the neck's maps with a two-way pyramid (:class:`selfkd.pyramid.BiFPN`, as many
    channels as the neck), classifies the sampled regions from the refined maps with a box head like the detector's,
    learns their labels, and teaches: its prediction of each region by the temperature KL, its refined maps
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


@MODELS.register_module()
class FRSKDCascadeRoIHead(SelfTaught, CascadeRoIHead):
    """:class:`FRSKDRoIHead` for Cascade R-CNN, with or without masks.

    The neck's maps are refined once a step. In each stage the self-teacher has a classifier of its own, which learns
    the labels of that stage's regions and teaches that stage::

        model = dict(roi_head=dict(type='selfkd_mmdet.FRSKDCascadeRoIHead'))

    Args:
        kwargs: options of ``CascadeRoIHead``; the others are :class:`FRSKDRoIHead`'s.

    Losses beside the head's own: ``s0.loss_teacher``, ``s0.loss_kd``, ``s1.loss_teacher``, ... with the stages' loss
    weights, and one ``loss_feature``, which is no stage's and has none.

    Raises:
        ValueError: as :class:`FRSKDRoIHead`.
    """
