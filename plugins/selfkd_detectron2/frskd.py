"""FRSKD for Detectron2's two-stage detectors with a feature pyramid."""

import copy
from contextlib import ExitStack
from typing import Any, Dict, List

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.cascade_rcnn import _ScaleGradient
from detectron2.structures import Instances
from torch import Tensor, nn

from selfkd.checks import at_least_zero, positive
from selfkd.defaults import FRSKD
from selfkd.losses import frskd_loss
from selfkd.losses.pskd import cross_entropy
from selfkd.pyramid import BiFPN

__all__ = ['FRSKDCascadeROIHeads', 'FRSKDROIHeads']


def options(node: CfgNode) -> Dict[str, Any]:
    """The settings in a method's node of the config, as arguments of its hook or head."""
    return {key.lower(): value for key, value in node.items() if key != 'ENABLED' and value is not None}


class SelfTaught:
    """What ROI heads become with a self-teacher: one pyramid, and a classifier for each stage."""

    teaches = True  # False where a loss is no training loss: see FRSKDHook
    _regions: Any = None  # of each stage, while the self-teacher is to see them

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        alpha: float = FRSKD['alpha']['detection'],
        beta: float = FRSKD['beta']['detection'],
        temperature: float = FRSKD['temperature']['detection'],
        depth: int = 1,
        repeats: int = 1,
        **kwargs,
    ):
        user = type(self).__name__
        at_least_zero(f'{user} (SELFKD.FRSKD)', alpha=alpha, beta=beta)
        positive(f'{user} (SELFKD.FRSKD)', temperature=temperature)
        super().__init__(**kwargs)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self._check_heads(user)
        levels = len(self.box_in_features)
        # All that is for training only is in here. It starts as the detector's own box heads and classifiers do. The
        # pooler (it has no weights) is one of its own: a hook on the detector's sees the detector's regions only.
        self.self_teacher = nn.ModuleDict(
            {
                'pyramid': BiFPN([in_channels] * levels, [in_channels] * levels, depth=depth, repeats=repeats),
                'pooler': copy.deepcopy(self.box_pooler),
                'classifier': nn.ModuleList(
                    nn.Sequential(copy.deepcopy(head), nn.Flatten(), copy.deepcopy(predictor.cls_score))
                    for head, predictor in zip(_stages(self.box_head), _stages(self.box_predictor))
                ),
            }
        )
        for level in self.self_teacher['pooler'].level_poolers:
            # One sample for each point: adaptive numbers make a step 1.9 instead of 1.5 times a plain one (R-18, CPU).
            level.sampling_ratio = 1

    def _check_heads(self, user: str) -> None:
        if len(self.box_in_features) < 2:
            raise ValueError(
                f'{user}: MODEL.ROI_HEADS.IN_FEATURES is {self.box_in_features}, but the self-teacher refines a '
                'pyramid of two levels or more: use an FPN, or SELFKD.PSKD or SELFKD.CSKD'
            )
        for predictor in _stages(self.box_predictor):
            if type(predictor) is not FastRCNNOutputLayers or predictor.use_sigmoid_ce:
                raise ValueError(
                    f'{user}: needs FastRCNNOutputLayers that classify with a softmax '
                    f'(MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE False), got {type(predictor).__name__}'
                )

    @classmethod
    def from_config(cls, cfg, input_shape):
        node = cfg.SELFKD.FRSKD
        if not node.ENABLED:
            raise ValueError(
                f'MODEL.ROI_HEADS.NAME {cls.__name__} is not set by hand: leave the name that the config has, and set '
                'SELFKD.FRSKD.ENABLED True'
            )
        in_channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        return {**super().from_config(cfg, input_shape), 'in_channels': in_channels, **options(node)}

    def _see_regions(self, proposals: List[Instances]) -> None:
        boxes = [p.proposal_boxes for p in proposals]  # not the proposals, whose boxes may be replaced
        self._regions.append((boxes, torch.cat([p.gt_classes for p in proposals])))

    def _forward_box(self, features: Dict[str, Tensor], proposals: List[Instances], *targets):
        if not (self.training and self.teaches and torch.is_grad_enabled()):
            return super()._forward_box(features, proposals, *targets)
        self._regions, logits, predictors = [], [], _stages(self.box_predictor)
        self._see_regions(proposals)
        with ExitStack() as hooks:
            for predictor in predictors:
                hooks.enter_context(predictor.register_forward_hook(lambda _, args, output: logits.append(output[0])))
            losses = super()._forward_box(features, proposals, *targets)
        regions, self._regions = self._regions, None
        maps = [features[name] for name in self.box_in_features]
        refined = self.self_teacher['pyramid'](maps)
        for stage, (boxes, labels) in enumerate(regions):
            pooled = self.self_teacher['pooler'](refined, boxes)
            # As Cascade R-CNN's own features: what is shared by the stages learns from their mean.
            pooled = _ScaleGradient.apply(pooled, 1 / len(regions))
            teacher_logits = self.self_teacher['classifier'][stage](pooled)
            terms = frskd_loss(
                logits[stage],
                teacher_logits,
                maps,
                refined,
                None,  # the head's own cross-entropy is among the losses
                alpha=self.alpha,
                beta=self.beta if stage == 0 else 0.0,
                temperature=self.temperature,
            )
            if 'loss_feature' in terms:  # it is the maps', and no stage's
                losses['loss_feature'] = terms['loss_feature']
            weight = predictors[stage].loss_weight.get('loss_cls', 1.0)
            suffix = f'_stage{stage}' if isinstance(self, CascadeROIHeads) else ''
            losses[f'loss_teacher{suffix}'] = weight * cross_entropy(teacher_logits, labels)
            losses[f'loss_kd{suffix}'] = terms['loss_kd']
        return losses


def _stages(module: nn.Module) -> List[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


@ROI_HEADS_REGISTRY.register()
class FRSKDROIHeads(SelfTaught, StandardROIHeads):
    """Feature refinement via self-knowledge distillation, for Faster and Mask R-CNN.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    In training a self-teacher refines the pyramid's maps with a two-way pyramid ([`selfkd.pyramid.BiFPN`][], as many
    channels), classifies the sampled regions from the refined maps with a box head like the detector's, learns their
    labels, and teaches: its prediction of each region by the temperature KL, its refined maps by
    attention transfer. Everything else is ``StandardROIHeads``', with the same parameter names: Detectron2's
    checkpointer loads the weights into that head, and leaves out those of ``self_teacher``. It is one setting,
    ``SELFKD.FRSKD.ENABLED True`` on an unmodified config, with options under ``SELFKD.FRSKD``.

    Args:
        in_channels: channels of each level of the pyramid.
        alpha: weight of the KL from the self-teacher's prediction. Those of the paper's classifiers (2, 100, T 4) are
            too large for a detector from scratch.
        beta: weight of the attention transfer; 0 for soft labels only.
        temperature: T.
        depth: separable convolutions per fusion in the self-teacher.
        repeats: passes of the self-teacher.
        kwargs: of ``StandardROIHeads``.

    Losses beside the head's own: ``loss_teacher`` (the self-teacher on the labels), ``loss_kd`` (averaged over the
    sampled regions), ``loss_feature``.

    Raises:
        ValueError: options out of range, a single level, regions that are not classified by a softmax.
    """


@ROI_HEADS_REGISTRY.register()
class FRSKDCascadeROIHeads(SelfTaught, CascadeROIHeads):
    """[`FRSKDROIHeads`][] for Cascade R-CNN, with or without masks: ``SELFKD.FRSKD.ENABLED True``, too.

    The pyramid's maps are refined once a step. In each stage the self-teacher has a classifier of its own, which learns
    the labels of that stage's regions and teaches that stage. As with the head's own losses, the gradients of the
    stages' ``loss_teacher`` are added in the classifiers, and averaged in the maps.

    Args:
        kwargs: of ``CascadeROIHeads``; the others are [`FRSKDROIHeads`][]'.

    Losses beside the head's own: ``loss_teacher_stage0``, ``loss_kd_stage0``, ``loss_teacher_stage1``, ... and one
    ``loss_feature``.

    Raises:
        ValueError: as [`FRSKDROIHeads`][].
    """

    def _match_and_label_boxes(self, proposals: List[Instances], stage: int, targets: List[Instances]):
        proposals = super()._match_and_label_boxes(proposals, stage, targets)
        if self._regions is not None:
            self._see_regions(proposals)
        return proposals
