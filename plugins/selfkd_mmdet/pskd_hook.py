"""PS-KD for MMDetection."""

from typing import Any, Dict, List, Optional

import torch
from mmdet.models.losses.utils import weight_reduce_loss
from mmdet.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from selfkd.losses import quality_focal_loss
from selfkd.past import CopyPast, Prediction
from selfkd_mmengine import PSKDHookBase, only_looks
from selfkd_mmengine.pskd_hook import probs_of

from .heads import has_focal_loss, region_heads, stage_of
from .regions import Regions, check_past_of_regions, hard_background, logits_of, past_losses
from .scores import Places, check_places, check_scores, gives_probs, score_loss, scores, scoring_head

__all__ = ['PSKDHook']


@HOOKS.register_module()
class PSKDHook(PSKDHookBase):
    """Progressive self-knowledge distillation of a detector's classification: two-stage, one-stage, transformers.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    The teacher is a frozen past copy of the detector: of the end of the previous epoch, or a moving average of its
    weights. Nothing else of the config changes::

        default_hooks = dict(pskd=dict(type='selfkd_mmdet.PSKDHook', alpha=0.8))

    Two-stage detectors (Faster, Mask, Cascade, Sparse R-CNN): it classifies the same regions that the student was
    given, and the classification loss becomes ``ce(label) + alpha_t * ce(past)``. Where regions are classified by
    sigmoids, the past's term is that of a sigmoid for each class; of the Seesaw loss, the product of its two softmaxes
    is taught.

    One-stage detectors with sigmoids (RetinaNet, FCOS, ATSS): it classifies the same anchors or points, and the loss
    becomes ``focal(label) + alpha_t * qfl(past)``, with the quality focal loss: unlike the focal loss of a soft target
    it is least where student and past agree.

    Other one-stage detectors (RTMDet, YOLOX, GFL, TOOD, SSD, SOLO, ...) and transformers (DETR, Deformable DETR, DINO,
    ...): it scores the same points, anchors, cells or queries, and the past's term is a loss of its own, ``loss_pskd``:
    the quality focal loss (softmax heads: the cross-entropy) between the two, summed over all places and divided by the
    number of objects that the past expects. Where a score is class times objectness (YOLOX, YOLOv3), the product is
    taught.

    The label's term keeps its whole weight: where student and past agree the past's has no gradient, and with
    ``1 - alpha_t`` classification would weigh ever less beside the boxes.

    Sampling, assignment, weights, normalisation, box regression, masks and the RPN are the toolkit's own.

    Args:
        alpha: final weight of the past's term, in [0, 1].
        teacher: ``'snapshot'``, the weights at the end of the previous epoch, or ``'ema'``, a moving average of the
            weights. ``'auto'`` is the snapshot: regions and anchors keep no identity that a bank could go by.
        teacher_mode, interval, ema_decay: of the past copy, see [`selfkd_mmengine.PSKDHookBase`][].
        keep_hard: two-stage: False weighs the label's term by ``1 - alpha_t``, as the paper does in classification: the
            target is then ``(1 - alpha_t) * label + alpha_t * past``.
        background: two-stage: also soften the target of background regions, whose class is one like the others. False
            leaves their label hard.

    Logged besides the losses: ``pskd_alpha``, ``pskd_hard`` and ``pskd_soft`` (the two weighted parts of ``loss_cls``)
    and, two-stage, ``pskd_entropy`` (mean entropy of the past predictions, in nats); the last three with the prefix
    ``s0.``, ``s1.``, ... for the stages of Cascade R-CNN.

    Raises:
        ValueError: at the start of training, for detectors and losses that it does not support.
    """

    task = 'detection'
    no_bank = 'regions and anchors keep no identity from one epoch to the next'
    past: CopyPast
    fires_every_step = False  # mmdet leaves out the loss of a batch without regions

    def __init__(
        self,
        alpha: float = 0.8,
        *,
        teacher: str = 'auto',
        teacher_mode: str = 'train',
        interval: Optional[int] = None,
        ema_decay: float = 0.999,
        keep_hard: bool = True,
        background: bool = True,
    ):
        copy = dict(teacher_mode=teacher_mode, interval=interval, ema_decay=ema_decay)
        super().__init__(alpha, teacher=teacher, keep_hard=keep_hard, background=background, **copy)
        # Of the forward pass under way; the past's are logits of anchors and points.
        self._inputs: Any = None
        self._samples: Any = None
        self._logits: Any = None
        self._past: Any = None

    def loss_modules(self, model: nn.Module) -> List[nn.Module]:
        if self.by_scores:
            return [scoring_head(model)]  # what it gives is looked at, and not changed
        return [model.bbox_head.loss_cls] if self.many_calls else [head.loss_cls for head in region_heads(model)]

    def check(self, runner: Runner, model: nn.Module) -> None:
        two_stage = getattr(model, 'roi_head', None) is not None
        # Whose focal loss takes the past's term in, with its own weights and normalisation.
        self.many_calls = not two_stage and has_focal_loss(model)
        self.by_scores = self.fires_every_step = not two_stage and not self.many_calls
        if two_stage:
            check_past_of_regions('PSKDHook', model)
        elif self.by_scores:
            check_places('PSKDHook', model)
        for name in ('background', 'keep_hard'):
            if not two_stage and not getattr(self, name):
                raise ValueError(f'PSKDHook: {name}=False is for two-stage detectors: remove it')
        self.student = model
        super().check(runner, model)

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        if self.by_scores:
            self._places = Places(self.student, self.past)
            self._handles += self._places.attach(self.student, lambda: self._computing_loss and self.teaches)
        elif not self.many_calls:
            self._regions = Regions(self.student, self.past)
            self._handles += self._regions.attach(lambda: self._computing_loss)

    @property
    def teaches(self) -> bool:
        return self.past.ready and self.current_alpha > 0

    def _before_model(self, model, args, kwargs) -> None:
        self._samples = kwargs.get('data_samples', args[1] if len(args) > 1 else None)
        super()._before_model(model, args, kwargs)

    def _after_model(self, model, args, output):
        if self._computing_loss and self.by_scores and self._taps:
            output = self._with_score_loss(output)
        self._inputs = self._samples = self._logits = None
        return super()._after_model(model, args, output)

    def _with_score_loss(self, output: Dict[str, Any]) -> Dict[str, Any]:
        of_labels = [loss for name, loss in output.items() if 'loss_cls' in name]
        self.logs['pskd_hard'] = sum(map(_total, of_labels), torch.zeros(()))
        self.logs['pskd_soft'] = torch.zeros(())
        if not self.teaches:
            return output
        past = self._places.scores(self._inputs, self._samples)
        loss = self.current_alpha * score_loss(scoring_head(self.student), self._logits, past)
        self.logs['pskd_soft'] = loss.detach()
        return {**output, 'loss_pskd': loss}

    def before_forward(self, inputs: Tensor) -> None:
        self._inputs, self._past = inputs, None
        if self.many_calls and self.teaches:
            run, teacher = self.past.run, self.past.model
            # In the order in which the heads hand their logits over: level by level, or all levels at once.
            found = run(teacher.bbox_head, run(teacher.extract_feat, inputs))[0]
            classes = teacher.bbox_head.cls_out_channels
            self._past = torch.cat([score.permute(0, 2, 3, 1).reshape(-1, classes) for score in found])
        elif not self.many_calls and not self.by_scores:
            self._regions.begin(inputs if self.teaches else None, self._samples)

    def _tap(self, module, args, kwargs, output):
        return None if only_looks(kwargs) else super()._tap(module, args, kwargs, output)

    def rewrite_loss(self, arguments: Dict[str, Any], loss: Any) -> Any:
        if self.by_scores:  # what is tapped is the head, and what it gives are scores
            self._logits = scores(self.tapped, loss, self._places.queries)
            if self._looking and not gives_probs(self.tapped):
                check_scores('PSKDHook', self.tapped, self._logits.detach())
            return loss
        if not self.many_calls:
            return self._with_past_of_regions(arguments, loss)
        return self.mix(loss, self._dense_loss(arguments) if self.teaches else None)

    def _dense_loss(self, arguments: Dict[str, Any]) -> Tensor:
        logits = arguments['pred']
        past, self._past = self._past[: len(logits)], self._past[len(logits) :]
        losses = quality_focal_loss(logits, past.float().sigmoid(), reduction='none').sum(1)
        return self.reduced(weight_reduce_loss, losses, arguments)

    def _with_past_of_regions(self, arguments: Dict[str, Any], loss: Any) -> Any:
        """The loss of a stage's regions; one of several parts (the Seesaw loss's) takes the past's term in."""
        stage, prefix = stage_of(self.student, self.tapped)
        parts = loss if isinstance(loss, dict) else {'': loss}
        total = sum(parts.values())
        self.logs[f'{prefix}pskd_entropy'] = torch.zeros(())
        if not self.teaches:
            self.mix(total, None, prefix)
            return loss
        cls_score, label = list(arguments.values())[:2]  # which the losses name differently
        weight = arguments.get('label_weights', arguments.get('weight'))
        past = probs_of(logits_of(self.tapped, self._regions.take(stage, cls_score)), self.tapped)
        self.logs[f'{prefix}pskd_entropy'] = self.entropy(Prediction(past, True), past.shape[1])
        if not self.background:
            past = hard_background(past, label, region_heads(self.student)[stage].num_classes)
        losses = past_losses(self.tapped, logits_of(self.tapped, cls_score), past)
        soft = self.reduced(
            weight_reduce_loss, losses, arguments if weight is None else {**arguments, 'weight': weight}
        )
        mixed = self.mix(total, soft, prefix)
        if loss is not parts:
            return mixed
        name = next(iter(parts))
        return {**parts, name: parts[name] + mixed - total}


def _total(loss) -> Tensor:
    """Of a loss, or of one for each level."""
    return sum(part.detach().sum() for part in (loss if isinstance(loss, list) else [loss]))
