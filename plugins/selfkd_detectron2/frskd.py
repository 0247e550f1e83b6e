"""FRSKD for Detectron2's two-stage detectors with a feature pyramid."""

from typing import Dict, List

import torch
from detectron2.config import configurable
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn

from selfkd.losses import frskd_loss
from selfkd.pyramid import BiFPN

__all__ = ['FRSKDROIHeads']


@ROI_HEADS_REGISTRY.register()
class FRSKDROIHeads(StandardROIHeads):
    """Feature refinement via self-knowledge distillation, for Faster and Mask R-CNN.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    In training a self-teacher refines the pyramid's maps with a two-way pyramid (:class:`selfkd.pyramid.BiFPN`, as many
    channels), classifies the sampled regions from the refined maps (average pool and a linear layer, as in the paper),
    learns their labels, and teaches: its prediction of each region by the temperature KL, its refined maps by
    attention transfer. Everything else is ``StandardROIHeads``', with the same parameter names: Detectron2's
    checkpointer loads the weights into that head, and leaves out those of ``self_teacher``. It is one setting,
    ``MODEL.ROI_HEADS.NAME FRSKDROIHeads``, with options under ``SELFKD.FRSKD``.

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

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        alpha: float = 0.5,
        beta: float = 1.0,
        temperature: float = 1.0,
        depth: int = 1,
        repeats: int = 1,
        **kwargs,
    ):
        if not (alpha >= 0 and beta >= 0 and temperature > 0):
            raise ValueError(
                'FRSKDROIHeads: alpha and beta must be at least 0 and temperature above 0 (SELFKD.FRSKD), got '
                f'{alpha}, {beta}, {temperature}'
            )
        super().__init__(**kwargs)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        levels, predictor = len(self.box_in_features), self.box_predictor
        if levels < 2:
            raise ValueError(
                f'FRSKDROIHeads: MODEL.ROI_HEADS.IN_FEATURES is {self.box_in_features}, but the self-teacher refines a '
                f'pyramid of two levels or more: use an FPN, or SELFKD.PSKD or SELFKD.CSKD'
            )
        if type(predictor) is not FastRCNNOutputLayers or predictor.use_sigmoid_ce:
            raise ValueError(
                f'FRSKDROIHeads: needs FastRCNNOutputLayers that classify with a softmax '
                f'(MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE False), got {type(predictor).__name__}'
            )
        # All that is for training only is in here.
        self.self_teacher = nn.ModuleDict(
            {
                'pyramid': BiFPN([in_channels] * levels, [in_channels] * levels, depth=depth, repeats=repeats),
                'classifier': nn.Linear(in_channels, self.num_classes + 1),
            }
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        options = {key.lower(): value for key, value in cfg.SELFKD.FRSKD.items()}
        in_channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        return {**super().from_config(cfg, input_shape), 'in_channels': in_channels, **options}

    def _forward_box(self, features: Dict[str, Tensor], proposals: List[Instances]):
        if not self.training:
            return super()._forward_box(features, proposals)
        boxes, logits = [p.proposal_boxes for p in proposals], []
        with self.box_predictor.register_forward_hook(lambda module, args, output: logits.append(output[0])):
            losses = super()._forward_box(features, proposals)
        maps = [features[name] for name in self.box_in_features]
        refined = self.self_teacher['pyramid'](maps)
        teacher_logits = self.self_teacher['classifier'](self.box_pooler(refined, boxes).mean((2, 3)))
        terms = frskd_loss(
            logits[0],
            teacher_logits,
            maps,
            refined,
            torch.cat([p.gt_classes for p in proposals]),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )
        del terms['loss_cls']  # the head's own is among the losses
        terms['loss_teacher'] *= self.box_predictor.loss_weight.get('loss_cls', 1.0)
        return {**losses, **terms}
