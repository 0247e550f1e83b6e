"""CS-KD for the regions of MMDetection's two-stage detectors."""

from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from mmdet.models.losses.utils import weight_reduce_loss
from mmdet.models.task_modules import BboxOverlaps2D
from mmdet.registry import HOOKS
from mmdet.structures import DetDataSample
from mmengine.runner import Runner
from torch import Tensor, nn

from selfkd.checks import at_least_zero, positive
from selfkd.losses import distillation_kl
from selfkd.pairing import same_class_partners
from selfkd.seeds import step_generator
from selfkd_mmengine import SelfKDHook, only_looks

from .heads import check_region_heads, per_stage, region_heads, stage_of

__all__ = ['CSKDHook']


@HOOKS.register_module()
class CSKDHook(SelfKDHook):
    """Class-wise self-knowledge distillation between the regions of a batch (Faster, Mask, Cascade R-CNN).

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020
    https://arxiv.org/abs/2003.13964

    Each sampled foreground region takes another one of its class in the batch as its partner, and the loss gets
    ``weight * T^2 * KL(partner || region)`` beside the head's own. The partner is a constant. It is drawn at random
    (see [`selfkd.pairing.same_class_partners`][]): from an object of the class in another image of the process's
    batch; where there is none, from another object in the image; and where the object is the only one of its class,
    from its other regions. Background, and classes with a single region, add nothing. The term is weighted and
    normalised as the head's own classification loss: with MMDetection's heads that is by the number of all sampled
    regions::

        default_hooks = dict(cskd=dict(type='selfkd_mmdet.CSKDHook', weight=1.0, temperature=4.0))

    Args:
        weight: lambda, at least 0.
        temperature: T. Defaults to 4, the paper's.

    Losses: ``loss_cskd``, the distillation term with its weight (with the prefix and the stage's loss weight in Cascade
    R-CNN), beside the head's own.

    Raises:
        ValueError: at the start of training, for detectors and losses that it does not support.
    """

    fires_every_step = False  # mmdet leaves out the loss of a batch without regions

    def __init__(self, weight: float = 1.0, *, temperature: float = 4.0):
        super().__init__()
        positive('CSKDHook', temperature=temperature)
        at_least_zero('CSKDHook', weight=weight)
        self.temperature, self.weight = temperature, weight

    def loss_modules(self, model: nn.Module) -> List[nn.Module]:
        return [head.loss_cls for head in region_heads(model)]

    def check(self, runner: Runner, model: nn.Module) -> None:
        check_region_heads('CSKDHook', model)

    def setup(self, runner: Runner, model: nn.Module) -> None:
        self.student = model
        self._rois: Optional[Tensor] = None

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self._handles.append(self.student.register_forward_pre_hook(self._see_samples, with_kwargs=True))
        for extractor in per_stage(self.student.roi_head.bbox_roi_extractor):
            self._handles.append(extractor.register_forward_pre_hook(self._see_regions, with_kwargs=True))

    def before_train_iter(self, runner: Runner, batch_idx, data_batch=None) -> None:
        super().before_train_iter(runner, batch_idx, data_batch)
        self.generator = step_generator(runner.iter)  # a resumed run draws the same pairs

    def _see_samples(self, model: nn.Module, args, kwargs) -> None:
        self._samples = args[1] if len(args) > 1 else kwargs.get('data_samples')

    def _see_regions(self, extractor: nn.Module, args, kwargs) -> None:
        self._rois = args[1] if len(args) > 1 else kwargs['rois']  # of the stage whose loss comes next

    def before_forward(self, inputs: Tensor) -> None:
        self.logs, self._rois = {}, None

    def _tap(self, module, args, kwargs, output):
        return None if only_looks(kwargs) else super()._tap(module, args, kwargs, output)

    def rewrite_loss(self, arguments: Dict[str, Any], loss: Tensor) -> Tensor:
        if self.weight == 0:
            return loss
        stage, prefix = stage_of(self.student, self.tapped)
        logits, label = arguments['cls_score'], arguments['label']
        if self._rois is None or len(self._rois) != len(label):
            seen = 0 if self._rois is None else len(self._rois)
            raise RuntimeError(
                f'CSKDHook: {type(self.student.roi_head).__name__} computes the loss of {len(label)} regions, but its '
                f'bbox_roi_extractor read {seen}: which objects they show is not known; train it without CSKDHook'
            )
        assigner = per_stage(self.student.roi_head.bbox_assigner)[stage]
        overlaps = getattr(assigner, 'iou_calculator', BboxOverlaps2D())
        partners = same_class_partners(
            label,
            objects_shown(self._rois, label, self._samples, overlaps),
            self._rois[:, 0],
            ignore=region_heads(self.student)[stage].num_classes,
            generator=self.generator,
        )
        kl = distillation_kl(logits, logits[partners], self.temperature, reduction='none')
        stage_weight = self.student.roi_head.stage_loss_weights[stage] if prefix else 1
        # An entry of its own, which the toolkit adds: what other hooks make of the head's loss does not touch it.
        value = self.reduced(weight_reduce_loss, kl, arguments)
        self.logs[f'{prefix}loss_cskd'] = stage_weight * self.weight * value
        return loss


def objects_shown(rois: Tensor, labels: Tensor, samples: Sequence[DetDataSample], iou_calculator: Callable) -> Tensor:
    """The object that each region was matched to: of those of its class in its image the one that it overlaps most.

    MMDetection's sampling results, which know it, are out of a hook's reach.

    Args:
        rois: image and box of each region, ``[N, 1 + D]``; D is 4, or 5 for rotated boxes.
        labels: ``[N]``.
        samples: of the images, with ``gt_instances``.
        iou_calculator: the assigner's; of objects and regions, whose boxes may be of two kinds.

    Returns:
        numbers ``[N]`` that tell the objects of an image apart; of background regions, any.
    """
    shown = torch.zeros_like(labels)
    for image, truth in enumerate(sample.gt_instances for sample in samples):
        if len(truth):
            overlaps = iou_calculator(truth.bboxes.to(rois), rois[:, 1:])
            best = overlaps.masked_fill(truth.labels[:, None] != labels, -1).argmax(0)
            shown = torch.where(rois[:, 0] == image, best, shown)
    return shown
