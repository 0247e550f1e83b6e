"""Where Detectron2's detectors classify: taps on their modules, and the same classification by a past copy.

The taps are torch forward hooks, live in training mode only. No class, parameter, buffer or checkpoint key of the model
changes.
"""

from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
import torch.nn.functional as F
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import FCOS, RetinaNet
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, RotatedBoxes, pairwise_iou, pairwise_iou_rotated
from torch import Tensor, nn

from selfkd.losses import quality_focal_loss, soft_cross_entropy
from selfkd.past import CopyPast

__all__ = ['Classified', 'DenseTap', 'RegionTap', 'Regions', 'make_tap']


class Regions(NamedTuple):
    """What the regions of a batch show.

    Attributes:
        labels: ``[R]``, in [0, K]; K is background.
        images: number of the image in the batch, ``[R]``.
        objects: number of the object in its image, ``[R]``; of no meaning for background.
    """

    labels: Tensor
    images: Tensor
    objects: Tensor


class Classified(NamedTuple):
    """What one classification loss of a training step was computed from.

    Attributes:
        name: of the loss in the detector's dict of losses.
        scope: of its logs, ``''`` or ``'stage1/'``.
        logits: regions: ``[R, K + 1]``, the last class is background; dense: of each level's anchors.
        match: regions: matches them with the objects again, as the detector did.
        weight: what the detector multiplies a sum over the logits with.
    """

    name: str
    scope: str
    logits: Tensor
    match: Optional[Callable[[], Regions]]
    weight: float


# Given the images, what was classified, and the detector's losses (to be changed in place).
Rewrite = Callable[[Tensor, List[Classified], Dict[str, Tensor]], None]


class RegionTap:
    """The sampled regions of Faster, Mask and Cascade R-CNN, and of detectors derived from them."""

    def __init__(self, model: nn.Module, method: str):
        self.model, self.method = model, method
        self.heads = heads = model.roi_heads
        self.predictors = list(heads.box_predictor) if isinstance(heads, CascadeROIHeads) else [heads.box_predictor]
        self.boxes: List[List[Boxes]] = []  # of each stage, for each image
        self.logits: List[Tensor] = []

    def attach(self, rewrite: Rewrite) -> list:
        self._rewrite = rewrite
        pooler = self.heads.pooler if isinstance(self.heads, Res5ROIHeads) else self.heads.box_pooler
        return [
            *self._check_first_step(pooler),
            self.heads.register_forward_pre_hook(self._start),
            pooler.register_forward_pre_hook(self._see_boxes),
            *(predictor.register_forward_hook(self._see_logits) for predictor in self.predictors),
            self.heads.register_forward_hook(self._finish),
        ]

    def _check_first_step(self, pooler: nn.Module) -> list:
        """Watches the first loss: is it made as ``past_losses`` makes that of the past? Subclasses may differ."""
        heads = self.heads
        res5 = isinstance(heads, Res5ROIHeads)
        box_heads = [heads.res5] if res5 else list(heads.box_head) if len(self.predictors) > 1 else [heads.box_head]
        seen: Dict[nn.Module, List[Any]] = {}  # module: its input and output

        def note(module, args, output):
            if module.training:
                seen.setdefault(module, [args[0], output])

        def pairs(images, features):
            """What should be the same, along the way from the images to the logits."""
            names = heads.in_features if res5 else heads.box_in_features
            given, found = seen[self.model.backbone]
            yield given, images
            yield from ((found[name], features[name]) for name in names)
            yield from zip(seen[pooler][0], (features[name] for name in names))
            yield seen[pooler][1], seen[box_heads[0]][0]  # the later stages' regions are others
            for box_head, predictor in zip(box_heads, self.predictors):
                found = seen[box_head][1]
                yield found.mean(dim=[2, 3]) if res5 else found, seen[predictor][0]

        def check(module, args, output):
            if not module.training:
                return
            if not (seen.keys() == set(modules) and all(_equal(*pair) for pair in pairs(args[0].tensor, args[1]))):
                raise ValueError(
                    f'{self.method}: {type(heads).__name__} in {type(self.model).__name__} does not classify regions '
                    'by its box pooler, head and predictor from the features of the backbone alone, so that a past '
                    'copy cannot be asked about the same regions: remove this method to train without it'
                )
            for call in self._calls(args[3]):
                self._check_loss(call, output[1])
            for handle in handles:
                handle.remove()
            seen.clear()

        modules = [self.model.backbone, pooler, *box_heads, *self.predictors]
        handles = [module.register_forward_hook(note) for module in modules]
        handles.append(heads.register_forward_hook(check, prepend=True))  # before another of ours changes the loss
        return handles

    def _check_loss(self, call: Classified, losses: Dict[str, Tensor]) -> None:
        assert call.match is not None  # these are regions
        expected = call.weight * F.cross_entropy(call.logits.detach().float(), call.match().labels, reduction='sum')
        found = losses.get(call.name)
        precision = max(1e-3, 16 * torch.finfo(call.logits.dtype).eps)
        if found is None or not torch.allclose(found.detach().float(), expected, rtol=precision, atol=1e-6):
            says = 'gives no such loss' if found is None else f'gives {float(found):.6g}'
            raise ValueError(
                f'{self.method}: the cross-entropy of the logits and labels of the regions is {float(expected):.6g}, '
                f'but {type(self.heads).__name__} with {type(self.predictors[0]).__name__} {says} as {call.name}: '
                'what it computes is another loss; remove this method to train without it'
            )

    def _start(self, heads, args) -> None:
        self.boxes, self.logits = [], []

    def _see_boxes(self, pooler, args) -> None:
        if pooler.training:
            self.boxes.append(args[1])

    def _see_logits(self, predictor, args, output) -> None:
        if predictor.training:
            self.logits.append(output[0])

    def _finish(self, heads, args, output):
        if not heads.training:
            return
        self._rewrite(args[0].tensor, self._calls(args[3]), output[1])
        self.boxes, self.logits = [], []  # lets go of the graph

    def _calls(self, targets: List[Instances]) -> List[Classified]:
        heads, calls = self.heads, []
        cascade = isinstance(heads, CascadeROIHeads)
        matchers = heads.proposal_matchers if cascade else [heads.proposal_matcher]
        for stage, (predictor, logits, boxes) in enumerate(zip(self.predictors, self.logits, self.boxes)):
            branches = len(boxes) // len(targets)  # of TridentNet, each with all images; else 1
            match = partial(_match, boxes, targets * branches, matchers[stage], heads.num_classes)
            weight = predictor.loss_weight.get('loss_cls', 1.0) / max(len(logits), 1)
            name, scope = (f'loss_cls_stage{stage}', f'stage{stage}/') if cascade else ('loss_cls', '')
            calls.append(Classified(name, scope, logits, match, weight))
        return calls

    def past_losses(self, copy: CopyPast, images: Tensor, calls: List[Classified], background: bool) -> List[Tensor]:
        """The cross-entropy with what the past copy says of the same regions, for each stage."""
        heads, losses = copy.model.roi_heads, []
        features = copy.run(copy.model.backbone, images)
        if len(next(iter(features.values()))) != len(self.boxes[0]):
            raise ValueError(
                f'PSKDHook: in evaluation mode {type(copy.model.backbone).__name__} gives other features than in '
                "training (of one branch only, perhaps): set teacher_mode='train' (SELFKD.PSKD.TEACHER_MODE)"
            )
        for stage, (call, boxes) in enumerate(zip(calls, self.boxes)):
            past = copy.run(_classify, heads, stage, features, boxes).float().softmax(1)
            if not background:
                assert call.match is not None  # these are regions
                labels = call.match().labels
                hard = torch.zeros_like(past).scatter_(1, labels[:, None], 1)
                past = torch.where((labels == past.shape[1] - 1)[:, None], hard, past)
            losses.append(call.weight * soft_cross_entropy(call.logits, past, reduction='sum'))
        return losses


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _classify(heads: nn.Module, stage: int, features: Dict[str, Tensor], boxes: List[Boxes]) -> Tensor:
    """What ROI heads say of given boxes: ``[R, K + 1]`` logits."""
    if isinstance(heads, Res5ROIHeads):
        pooled = heads.pooler([features[f] for f in heads.in_features], boxes)
        return heads.box_predictor(heads.res5(pooled).mean(dim=[2, 3]))[0]
    pooled = heads.box_pooler([features[f] for f in heads.box_in_features], boxes)
    if isinstance(heads, CascadeROIHeads):
        return heads.box_predictor[stage](heads.box_head[stage](pooled))[0]
    return heads.box_predictor(heads.box_head(pooled))[0]


def _match(boxes: List[Boxes], targets: List[Instances], matcher: Matcher, background: int) -> Regions:
    """What the detector took the regions for. It draws them at random, but matches them by rule."""
    rows = []
    for image, (regions, target) in enumerate(zip(boxes, targets)):
        labels = objects = torch.full((len(regions),), background, device=regions.device)
        if len(target):
            overlaps = pairwise_iou_rotated if isinstance(regions, RotatedBoxes) else pairwise_iou
            objects, kinds = matcher(overlaps(target.gt_boxes, regions))
            labels = torch.where(kinds == 1, target.gt_classes[objects], background)
        rows.append(Regions(labels, torch.full_like(labels, image), objects))
    return Regions(*(torch.cat(column) for column in zip(*rows)))


class DenseTap:
    """The anchors of RetinaNet and FCOS, which classify with a sigmoid for each class and the focal loss."""

    def __init__(self, model: nn.Module):
        self.model = model
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
            self.targets: Any = [sample['instances'].to(model.device) for sample in args[0]]
            call = Classified(self.name, '', self.logits, None, 1 / model.loss_normalizer)
            self._rewrite(self.images, [call], losses)
        self.images = self.features = self.logits = self.targets = None

    def past_losses(self, copy: CopyPast, images: Tensor, calls: List[Classified], background: bool) -> List[Tensor]:
        """The quality focal loss towards what the past copy says of the same anchors, those ignored left out."""
        (call,), model = calls, self.model
        features = copy.run(copy.model.backbone, images)
        past = copy.run(copy.model.head, [features[f] for f in model.head_in_features])[0]
        labels, _ = model.label_anchors(model.anchor_generator(self.features), self.targets)
        counted = torch.stack(labels) >= 0
        student, past = (
            torch.cat([permute_to_N_HWA_K(level, model.num_classes) for level in levels], dim=1)[counted]
            for levels in (call.logits, past)
        )
        past = past.float().sigmoid()
        loss = quality_focal_loss(student, past, gamma=model.focal_loss_gamma, reduction='sum')
        return [call.weight * loss]


MODELS = (GeneralizedRCNN, PanopticFPN)
ROI_HEADS = (Res5ROIHeads, StandardROIHeads, CascadeROIHeads)
DENSE_HEADS = {RetinaNet: RetinaNetHead, FCOS: FCOSHead}


def make_tap(model: nn.Module, method: str, dense: bool):
    """The tap for this detector; ``dense``: whether the method works with one-stage detectors as well.

    Detectors derived from those supported are looked at in the first step, as they may compute their losses otherwise.

    Raises:
        ValueError: a detector, ROI head or predictor that is not supported. One-stage detectors derived from those that
            are supported are not.
    """
    if dense and type(model) in DENSE_HEADS:
        head = DENSE_HEADS[type(model)]
        if type(model.head) is not head:
            raise ValueError(f'{method}: the head {type(model.head).__name__} is not supported: use {head.__name__}')
        if 0 < model.focal_loss_gamma < 1:
            raise ValueError(f'{method}: focal_loss_gamma must be 0 or at least 1, got {model.focal_loss_gamma}')
        return DenseTap(model)
    heads = getattr(model, 'roi_heads', None)
    if not isinstance(model, MODELS) or not isinstance(heads, ROI_HEADS):
        with_heads = '' if heads is None else f' with the ROI heads {type(heads).__name__}'
        models, known = (' or '.join(kind.__name__ for kind in kinds) for kinds in (MODELS, ROI_HEADS))
        others = ', or RetinaNet or FCOS' if dense else ''
        raise ValueError(
            f'{method}: {type(model).__name__}{with_heads} is not supported: it needs {models} with {known}, or '
            f'derived from them{others}; remove this method to train without it'
        )
    tap = RegionTap(model, method)
    for predictor in tap.predictors:
        if not isinstance(predictor, FastRCNNOutputLayers) or predictor.use_sigmoid_ce:
            sigmoid = getattr(predictor, 'use_sigmoid_ce', False)
            setting = ' with use_sigmoid_ce (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE)' if sigmoid else ''
            raise ValueError(
                f'{method}: the box predictor {type(predictor).__name__}{setting} is not supported: it needs '
                'FastRCNNOutputLayers, which classifies regions with a softmax'
            )
    return tap
