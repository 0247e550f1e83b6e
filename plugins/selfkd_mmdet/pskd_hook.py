"""PS-KD for MMDetection's two-stage detectors."""

from typing import Dict, List, Optional

import torch
import torch.nn.functional as F
from mmdet.models.losses import CrossEntropyLoss
from mmdet.models.losses.utils import weight_reduce_loss
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from selfkd.losses import soft_cross_entropy
from selfkd_mmengine import PSKDHookBase

__all__ = ['PSKDHook']


@HOOKS.register_module()
class PSKDHook(PSKDHookBase):
    """Progressive self-knowledge distillation of the region classification of Faster, Mask and Cascade R-CNN.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    A frozen past copy of the detector (of the end of the previous epoch) classifies the same regions that the student
    was given, and the target of the classification loss becomes ``(1 - alpha_t) * label + alpha_t * past``. Sampling,
    region weights, normalisation, box regression, masks and the RPN are the toolkit's own. Nothing else of the config
    changes::

        custom_hooks = [dict(type='selfkd_mmdet.PSKDHook', alpha=0.8)]

    Args:
        alpha: final share of the past prediction, in [0, 1].
        interval: in iteration-based loops: iterations between two refreshes of the past copy. Defaults to one pass over
            the training set.
        background: also soften the target of background regions, whose class is one like the others. False leaves
            their label hard.

    Logged besides the losses: ``pskd_alpha``, ``pskd_hard`` and ``pskd_soft`` (the two parts of ``loss_cls``), with the
    prefix ``s0.``, ``s1.``, ... for the stages of Cascade R-CNN.

    Raises:
        ValueError: at the start of training, for detectors and losses that it does not support.
    """

    fires_every_step = False  # mmdet leaves out the loss of a batch without regions

    def __init__(self, alpha: float = 0.8, interval: Optional[int] = None, background: bool = True):
        super().__init__(alpha, snapshot=True, interval=interval)
        self.background = background

    def loss_modules(self, model: nn.Module) -> List[nn.Module]:
        return [head.loss_cls for head in _bbox_heads(model)]

    def check(self, runner: Runner, model: nn.Module) -> None:
        super().check(runner, model)
        roi_head = getattr(model, 'roi_head', None)
        if not isinstance(roi_head, (StandardRoIHead, CascadeRoIHead)) or not roi_head.with_bbox:
            raise ValueError(
                f'PSKDHook: {type(model).__name__} with the RoI head {type(roi_head).__name__} is not '
                f'supported: it needs a '
                f'two-stage detector with StandardRoIHead or CascadeRoIHead (Faster, Mask, Cascade R-CNN)'
            )
        for head in _bbox_heads(model):
            loss = head.loss_cls
            if type(loss) is not CrossEntropyLoss or loss.use_sigmoid or loss.use_mask:
                raise ValueError(
                    f'PSKDHook: {type(head).__name__} classifies regions with {type(loss).__name__}, but a past '
                    f'prediction is '
                    f'a softmax over classes: use loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False)'
                )

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        roi_head = self.student.roi_head
        extractors = roi_head.bbox_roi_extractor
        for extractor in extractors if isinstance(extractors, nn.ModuleList) else [extractors]:
            self._handles.append(extractor.register_forward_pre_hook(self._see_regions))

    def setup(self, runner: Runner, model: nn.Module) -> None:
        super().setup(runner, model)
        self.student = model

    def before_forward(self, inputs: Tensor) -> None:
        if self.teacher_ready:
            with torch.no_grad():
                self._past_feats = self.teacher.model.extract_feat(inputs)

    def _see_regions(self, extractor: nn.Module, args) -> None:
        self._rois = args[1]  # of the stage whose loss comes next

    def rewrite_loss(self, arguments: Dict[str, object], loss: Tensor) -> Tensor:
        logits, label = arguments['cls_score'], arguments['label']
        heads = _bbox_heads(self.student)
        stage = next(i for i, head in enumerate(heads) if head.loss_cls is self.tapped)
        prefix = f's{stage}.' if len(heads) > 1 else ''
        if not self.teacher_ready or self.current_alpha == 0:
            self.logs.update({f'{prefix}pskd_hard': loss.detach(), f'{prefix}pskd_soft': torch.zeros(())})
            return loss
        roi_head = self.teacher.model.roi_head
        stage_argument = (stage,) if isinstance(roi_head, CascadeRoIHead) else ()
        with torch.no_grad():
            past = roi_head._bbox_forward(*stage_argument, self._past_feats, self._rois)['cls_score'].float().softmax(1)
        if not self.background:
            is_background = (label == heads[stage].num_classes)[:, None]
            past = torch.where(is_background, F.one_hot(label, past.shape[1]).to(past.dtype), past)
        class_weight = None if self.tapped.class_weight is None else past.new_tensor(self.tapped.class_weight)
        soft = soft_cross_entropy(logits, past, class_weight=class_weight, reduction='none')
        return self.mix(loss, self.reduced(weight_reduce_loss, soft, arguments), prefix)


def _bbox_heads(model: nn.Module) -> List[nn.Module]:
    heads = model.roi_head.bbox_head
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]
