"""Where Detectron2's detectors classify: taps on their modules, and the same classification by a past copy.

The taps are torch forward hooks, live in training mode only. No class, parameter, buffer or checkpoint key of the model
changes.
"""

from functools import partial
from typing import Callable, Dict, List, NamedTuple, Optional

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch import FCOS, RetinaNet
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from selfkd.losses import quality_focal_loss, soft_cross_entropy
from selfkd.teacher import in_background

from .frskd import FRSKDCascadeROIHeads, FRSKDROIHeads

__all__ = ['Classified', 'DenseTap', 'RegionTap', 'make_tap']


class Classified(NamedTuple):
    """What one classification loss of a training step was computed from.

    Attributes:
        name: of the loss in the detector's dict of losses.
        scope: of its logs, ``''`` or ``'stage1/'``.
        logits: regions: ``[R, K + 1]``, the last class is background; dense: of the anchors that are not ignored,
            ``[R, K]``.
        labels: regions: ``[R]``, in [0, K]; dense: None.
        weight: what the detector multiplies a sum over the R logits with.
    """

    name: str
    scope: str
    logits: Tensor
    labels: Optional[Tensor]
    weight: float


# Given the images, what was classified, and the detector's losses (to be changed in place).
Rewrite = Callable[[Tensor, List[Classified], Dict[str, Tensor]], None]


class RegionTap:
    """The sampled regions of Faster, Mask and Cascade R-CNN."""

    keep_hard = False  # the cross-entropy is linear in its target: the two terms share its weight

    def __init__(self, model: nn.Module):
        self.heads = heads = model.roi_heads
        self.predictors = list(heads.box_predictor) if isinstance(heads, CascadeROIHeads) else [heads.box_predictor]
        self.past: Optional[nn.Module] = None  # the copy that classifies the same regions
        self.boxes: List[List[Boxes]] = []  # of each stage, for each image
        self.logits: List[Tensor] = []
        self._past_logits: List[Callable[[], Tensor]] = []

    def attach(self, rewrite: Rewrite) -> list:
        self._rewrite = rewrite
        pooler = self.heads.pooler if isinstance(self.heads, Res5ROIHeads) else self.heads.box_pooler
        return [
            self.heads.register_forward_pre_hook(self._start),
            pooler.register_forward_pre_hook(self._see_boxes),
            *(predictor.register_forward_hook(self._see_logits) for predictor in self.predictors),
            self.heads.register_forward_hook(self._finish),
        ]

    @torch.no_grad()
    def _start(self, heads, args) -> None:
        self.boxes, self.logits, self._past_logits = [], [], []
        if heads.training and self.past is not None:
            self._past_features = self.past.backbone(args[0].tensor)

    def _see_boxes(self, pooler, args) -> None:
        if not pooler.training:
            return
        boxes, stage = args[1], len(self.boxes)
        self.boxes.append(boxes)
        if self.past is None:
            return
        if boxes[0].device.type == 'cpu' and not torch.is_autocast_cpu_enabled():
            # The student's regions are read on one thread: the past copy is at work meanwhile.
            self._past_logits.append(in_background(self._classify, stage, boxes).result)
        else:
            self._past_logits.append(partial(self._classify, stage, boxes))

    def _see_logits(self, predictor, args, output) -> None:
        if predictor.training:
            self.logits.append(output[0])

    def _finish(self, heads, args, output):
        if not heads.training:
            return
        images, _, _, targets = args
        cascade = isinstance(heads, CascadeROIHeads)
        matchers = heads.proposal_matchers if cascade else [heads.proposal_matcher]
        calls = []
        for stage, (predictor, logits, boxes) in enumerate(zip(self.predictors, self.logits, self.boxes)):
            labels = torch.cat([_labels(b, t, matchers[stage], heads.num_classes) for b, t in zip(boxes, targets)])
            weight = predictor.loss_weight.get('loss_cls', 1.0) / max(len(logits), 1)
            name, scope = (f'loss_cls_stage{stage}', f'stage{stage}/') if cascade else ('loss_cls', '')
            calls.append(Classified(name, scope, logits, labels, weight))
        self._rewrite(images.tensor, calls, output[1])
        self.boxes, self.logits, self._past_logits, self._past_features = [], [], [], {}  # lets go of the graph

    def past_logits(self, images: Tensor) -> List[Tensor]:
        """What the past copy says of the same regions, for each stage."""
        return [logits() for logits in self._past_logits]

    @torch.no_grad()
    def _classify(self, stage: int, boxes: List[Boxes]) -> Tensor:
        heads = self.past.roi_heads
        if isinstance(heads, Res5ROIHeads):
            pooled = heads.pooler([self._past_features[f] for f in heads.in_features], boxes)
            return heads.box_predictor(heads.res5(pooled).mean(dim=[2, 3]))[0]
        pooled = heads.box_pooler([self._past_features[f] for f in heads.box_in_features], boxes)
        if isinstance(heads, CascadeROIHeads):
            return heads.box_predictor[stage](heads.box_head[stage](pooled))[0]
        return heads.box_predictor(heads.box_head(pooled))[0]

    def past_loss(self, call: Classified, past_logits: Tensor, background: bool) -> Tensor:
        past = past_logits.float().softmax(1)
        if not background:
            hard = torch.zeros_like(past).scatter_(1, call.labels[:, None], 1)
            past = torch.where((call.labels == past.shape[1] - 1)[:, None], hard, past)
        return call.weight * soft_cross_entropy(call.logits, past, reduction='sum')


def _labels(boxes: Boxes, target: Instances, matcher, background: int) -> Tensor:
    """The classes that the detector gave an image's regions. It draws them at random, but matches them by rule."""
    if not len(target):
        return torch.full((len(boxes),), background, device=boxes.device)
    matches, kinds = matcher(pairwise_iou(target.gt_boxes, boxes))
    return torch.where(kinds == 1, target.gt_classes[matches], background)


class DenseTap:
    """The anchors of RetinaNet and FCOS, which classify with a sigmoid for each class and the focal loss."""

    keep_hard = True  # the past's term fades where student and past agree

    def __init__(self, model: nn.Module):
        self.model = model
        self.past: Optional[nn.Module] = None  # the copy that classifies the same anchors
        self.name = 'loss_fcos_cls' if isinstance(model, FCOS) else 'loss_cls'

    def attach(self, rewrite: Rewrite) -> list:
        self._rewrite = rewrite
        return [
            self.model.backbone.register_forward_pre_hook(self._see_images),
            self.model.head.register_forward_hook(self._see_logits),
            self.model.register_forward_hook(self._finish),
        ]

    def _see_images(self, backbone, args) -> None:
        self.images = args[0]

    def _see_logits(self, head, args, output) -> None:
        self.features, self.logits = args[0], output[0]

    def _finish(self, model, args, losses):
        if model.training:
            labels, _ = model.label_anchors(
                model.anchor_generator(self.features), [x['instances'].to(model.device) for x in args[0]]
            )
            self.counted = torch.stack(labels) >= 0
            call = Classified(self.name, '', self._flat(self.logits), None, 1 / model.loss_normalizer)
            self._rewrite(self.images, [call], losses)
        self.images = self.features = self.logits = None

    def _flat(self, logits: List[Tensor]) -> Tensor:
        return torch.cat([permute_to_N_HWA_K(x, self.model.num_classes) for x in logits], dim=1)[self.counted]

    @torch.no_grad()
    def past_logits(self, images: Tensor) -> List[Tensor]:
        features = self.past.backbone(images)
        return [self._flat(self.past.head([features[f] for f in self.past.head_in_features])[0])]

    def past_loss(self, call: Classified, past_logits: Tensor, background: bool) -> Tensor:
        past = past_logits.float().sigmoid()
        loss = quality_focal_loss(call.logits, past, gamma=self.model.focal_loss_gamma, reduction='sum')
        return call.weight * loss


ROI_HEADS = (Res5ROIHeads, StandardROIHeads, CascadeROIHeads, FRSKDROIHeads, FRSKDCascadeROIHeads)


def make_tap(model: nn.Module, method: str, dense: bool):
    """The tap for this detector; ``dense``: whether the method works with one-stage detectors as well.

    Raises:
        ValueError: a detector, ROI head or predictor that is not supported. Subclasses are not, as they may compute
            their losses otherwise.
    """
    if dense and type(model) in (RetinaNet, FCOS):
        if type(model.head) not in (RetinaNetHead, FCOSHead):
            raise ValueError(
                f'{method}: the head {type(model.head).__name__} is not supported: use RetinaNetHead or FCOSHead'
            )
        if 0 < model.focal_loss_gamma < 1:
            raise ValueError(f'{method}: focal_loss_gamma must be 0 or at least 1, got {model.focal_loss_gamma}')
        return DenseTap(model)
    heads = getattr(model, 'roi_heads', None)
    if type(model) is not GeneralizedRCNN or type(heads) not in ROI_HEADS:
        names = ', '.join(kind.__name__ for kind in ROI_HEADS)
        raise ValueError(
            f'{method}: {type(model).__name__} with the ROI heads {type(heads).__name__} is not supported: it needs '
            f'GeneralizedRCNN with {names}' + (', or RetinaNet or FCOS' if dense else '')
        )
    tap = RegionTap(model)
    for predictor in tap.predictors:
        if type(predictor) is not FastRCNNOutputLayers or predictor.use_sigmoid_ce:
            sigmoid = ' with use_sigmoid_ce (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE)'
            raise ValueError(
                f'{method}: the box predictor {type(predictor).__name__}'
                f'{sigmoid if getattr(predictor, "use_sigmoid_ce", False) else ""} is not supported: it needs '
                f'FastRCNNOutputLayers, which classifies regions with a softmax'
            )
    return tap
