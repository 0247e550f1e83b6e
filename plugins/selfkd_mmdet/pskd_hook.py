"""PS-KD for MMDetection."""

from functools import partial
from typing import Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from mmdet.models.losses.utils import weight_reduce_loss
from mmdet.models.roi_heads import CascadeRoIHead, SingleRoIExtractor
from mmdet.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from selfkd.losses import quality_focal_loss, soft_cross_entropy
from selfkd.checks import at_least_zero
from selfkd.teacher import in_background
from selfkd_mmengine import PSKDHookBase

from .heads import check_dense_head, check_region_heads, per_stage, region_heads, stage_of

__all__ = ['PSKDHook']


class AheadRoIExtractor(SingleRoIExtractor):
    """The past copy's on CPUs: reads regions in a thread of its own.

    The student's are read on one thread. Those of the past copy, read meanwhile, take next to no time of their own.
    """

    regions, reading = None, None

    def start(self, feats: Sequence[Tensor], regions: Tensor) -> None:
        """Begins what ``forward(feats, regions)`` will ask for."""
        rois, levels = regions.type_as(feats[0]), self.map_roi_levels(regions, self.num_inputs)
        output = feats[0].new_empty(len(rois), self.out_channels, *self.roi_layers[0].output_size)
        parts = [(levels == level).nonzero().flatten() for level in range(self.num_inputs)]

        def read() -> Tensor:
            for feat, layer, part in zip(feats, self.roi_layers, parts):
                output[part] = layer(feat, rois[part])
            return output

        self.regions, self.reading = regions, in_background(read)

    def forward(self, feats: Sequence[Tensor], regions: Tensor) -> Tensor:
        if regions is not self.regions:
            self.start(feats, regions)
        reading, self.regions, self.reading = self.reading, None, None
        return reading.result()


@HOOKS.register_module()
class PSKDHook(PSKDHookBase):
    """Progressive self-knowledge distillation of a detector's classification, two-stage and one-stage.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    The teacher is a frozen past copy of the detector (of the end of the previous epoch). Nothing else of the config
    changes::

        custom_hooks = [dict(type='selfkd_mmdet.PSKDHook', alpha=0.8)]

    Two-stage detectors (Faster, Mask, Cascade R-CNN): it classifies the same regions that the student was given, and
    the target of the classification loss becomes ``(1 - alpha_t) * label + alpha_t * past``.

    One-stage detectors with sigmoids (RetinaNet, FCOS, ATSS): it classifies the same anchors or points, and the loss
    becomes ``focal(label) + alpha_t * soft_weight * qfl(past)``, with the quality focal loss: unlike the focal loss of
    a soft target it is least where student and past agree. The label's term keeps its whole weight: the past's fades
    where the two agree, and with ``1 - alpha_t`` classification would weigh ever less beside the boxes.

    Sampling, assignment, weights, normalisation, box regression, masks and the RPN are the toolkit's own.

    Args:
        alpha: final share of the past prediction, in [0, 1].
        interval: in iteration-based loops: iterations between two refreshes of the past copy. Defaults to one pass over
            the training set.
        background: two-stage: also soften the target of background regions, whose class is one like the others. False
            leaves their label hard.
        soft_weight: one-stage: weight of the teacher's term, at least 0.
        teacher_mode: of the past copy: ``'train'``, as the network was when it trained (dropout, batch norm by the
            batch unless frozen), or ``'eval'``.

    Logged besides the losses: ``pskd_alpha``, ``pskd_hard`` and ``pskd_soft`` (the two parts of ``loss_cls``), with the
    prefix ``s0.``, ``s1.``, ... for the stages of Cascade R-CNN.

    Raises:
        ValueError: at the start of training, for detectors and losses that it does not support.
    """

    fires_every_step = False  # mmdet leaves out the loss of a batch without regions

    def __init__(
        self,
        alpha: float = 0.8,
        interval: Optional[int] = None,
        background: bool = True,
        soft_weight: float = 1.0,
        teacher_mode: str = 'train',
    ):
        super().__init__(alpha, snapshot=True, interval=interval, teacher_mode=teacher_mode)
        at_least_zero('PSKDHook', soft_weight=soft_weight)
        self.background, self.soft_weight = background, soft_weight

    def loss_modules(self, model: nn.Module) -> List[nn.Module]:
        return [model.bbox_head.loss_cls] if self.many_calls else [head.loss_cls for head in region_heads(model)]

    def check(self, runner: Runner, model: nn.Module) -> None:
        super().check(runner, model)
        one_stage = hasattr(model, 'bbox_head')
        (check_dense_head if one_stage else check_region_heads)('PSKDHook', model)
        if one_stage and not self.background:
            raise ValueError('PSKDHook: background=False is for two-stage detectors: remove it')
        if not one_stage and self.soft_weight != 1:
            raise ValueError('PSKDHook: soft_weight is for one-stage detectors (their two terms differ): remove it')
        self.many_calls = one_stage

    def setup(self, runner: Runner, model: nn.Module) -> None:
        super().setup(runner, model)
        self.student = model
        if next(model.parameters()).device.type == 'cpu':
            for module in self.teacher.model.modules():
                if type(module) is SingleRoIExtractor:
                    module.__class__ = AheadRoIExtractor
                    for layer in module.roi_layers:
                        # The same numbers; mmcv's own holds Python's lock, so that threads would wait for each other.
                        layer.use_torchvision = getattr(layer, 'pool_mode', '') == 'avg'

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        if not self.many_calls:
            roi_heads = self.student.roi_head, self.teacher.model.roi_head
            for student, past in zip(*(per_stage(head.bbox_roi_extractor) for head in roi_heads)):
                self._handles.append(student.register_forward_pre_hook(partial(self._see_regions, past)))

    def before_forward(self, inputs: Tensor) -> None:
        if not self.teaches:
            return
        teacher = self.teacher.model
        with torch.no_grad():
            feats = teacher.extract_feat(inputs)
            if self.many_calls:
                # In the order in which the heads hand their logits over: level by level, or all levels at once.
                scores, classes = teacher.bbox_head(feats)[0], teacher.bbox_head.cls_out_channels
                self._past = torch.cat([score.permute(0, 2, 3, 1).reshape(-1, classes) for score in scores])
            else:
                self._past_feats = feats

    @property
    def teaches(self) -> bool:
        return self.teacher_ready and self.current_alpha > 0

    def _see_regions(self, past: nn.Module, extractor: nn.Module, args) -> None:
        if not self._computing_loss:
            return
        self._rois = args[1]  # of the stage whose loss comes next
        if self.teaches and self.background and isinstance(past, AheadRoIExtractor):
            past.start(self._past_feats, self._rois)

    def rewrite_loss(self, arguments: Dict[str, object], loss: Tensor) -> Tensor:
        stage, prefix = (0, '') if self.many_calls else stage_of(self.student, self.tapped)
        if not self.teaches:
            return self.mix(loss, prefix=prefix)
        soft = self._dense_losses(arguments['pred']) if self.many_calls else self._region_losses(stage, arguments)
        return self.mix(loss, self.reduced(weight_reduce_loss, soft, arguments), prefix, keep_hard=self.many_calls)

    def _dense_losses(self, logits: Tensor) -> Tensor:
        past, self._past = self._past[: len(logits)], self._past[len(logits) :]
        return self.soft_weight * quality_focal_loss(logits, past.sigmoid(), reduction='none').sum(1)

    def _region_losses(self, stage: int, arguments: Dict[str, object]) -> Tensor:
        logits, label = arguments['cls_score'], arguments['label']
        if self.background:
            past = self._classify(stage, self._rois)
        else:
            past = F.one_hot(label, logits.shape[1]).float()
            foreground = label != region_heads(self.student)[stage].num_classes
            if foreground.any():
                past[foreground] = self._classify(stage, self._rois[foreground])
        if stage + 1 == len(region_heads(self.student)):
            self._past_feats = None  # not to be held through the backward pass
        return soft_cross_entropy(logits, past, class_weight=self.tapped.class_weight, reduction='none')

    @torch.no_grad()
    def _classify(self, stage: int, rois: Tensor) -> Tensor:
        roi_head = self.teacher.model.roi_head
        stage_argument = (stage,) if isinstance(roi_head, CascadeRoIHead) else ()
        return roi_head._bbox_forward(*stage_argument, self._past_feats, rois)['cls_score'].float().softmax(1)
