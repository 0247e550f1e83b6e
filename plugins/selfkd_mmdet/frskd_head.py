"""FRSKD for MMDetection's two-stage detectors with a feature pyramid."""

from functools import lru_cache
from typing import Any, Tuple, Union

import torch
from mmcv import ops
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.base_roi_head import BaseRoIHead
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from mmengine.model import ModuleDict, ModuleList
from torch import Tensor

from selfkd.checks import at_least_zero, positive
from selfkd.losses import frskd_loss
from selfkd.pyramid import BiFPN
from selfkd_mmengine.base_type import find_base_type

from .heads import check_box_heads, check_region_loss, check_replaced_head, per_stage, registered

__all__ = ['FRSKDRoIHead']


@MODELS.register_module()
class FRSKDRoIHead(BaseRoIHead):
    """Feature refinement via self-knowledge distillation, for Faster, Mask and Cascade R-CNN with a feature pyramid.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    In training a self-teacher refines the neck's maps with a two-way pyramid ([`selfkd.pyramid.BiFPN`][], as many
    channels as the neck), classifies the sampled regions from the refined maps with a box head like the detector's,
    learns their labels, and teaches: its prediction of each region by the temperature KL, its refined maps
    by attention transfer to the neck's. It is one option of a config::

        model = dict(roi_head=dict(type='selfkd_mmdet.FRSKDRoIHead'))

    Everything else is that of ``StandardRoIHead`` or, where the config gives ``num_stages``, of ``CascadeRoIHead``,
    with the same parameter names, so the weights load into that head (``selfkd publish`` drops the
    self-teacher). In Cascade R-CNN the maps are refined once a step, and each stage has a classifier of its own in the
    self-teacher.

    The option takes the place of the RoI head's type. Where that was another one, a class of your own derived from
    these, name it, and everything else is that class's::

        model = dict(roi_head=dict(type='selfkd_mmdet.FRSKDRoIHead', base_type='MyRoIHead'))

    Without ``base_type`` a config that has options, box or mask heads of another RoI head is refused, and so is any
    while a RoI head is registered that is derived from these and not MMDetection's.

    Args:
        base_type: the RoI head's type before, by name or as a class; by default ``StandardRoIHead`` or
            ``CascadeRoIHead``.
        alpha: weight of the KL from the self-teacher's prediction. Those of the paper's classifiers (2, 100, T 4) are
            too large for a detector from scratch.
        beta: weight of the attention transfer; 0 for soft labels only.
        temperature: T.
        depth: separable convolutions per fusion in the self-teacher.
        repeats: passes of the self-teacher.
        kwargs: options of that RoI head.

    Losses beside the head's own: ``loss_teacher`` (the self-teacher on the labels, with the head's ``loss_cls``),
    ``loss_kd`` (averaged over the sampled regions), ``loss_feature``. In Cascade R-CNN ``s0.loss_teacher``,
    ``s0.loss_kd``, ``s1.loss_teacher``, ... with the stages' loss weights, and one ``loss_feature``, which is no
    stage's and has none.

    Raises:
        ValueError: options out of range; a config of another RoI head, or of what may be one; a RoI extractor with less
            than two levels; regions that are not classified by a softmax.
        RuntimeError: in training, a RoI head that classifies its regions without ``bbox_loss``.
    """

    plain_type: type  # what it is besides
    _classified: Any = None  # logits and sampling results of each stage, while the self-teacher is to see them

    def __new__(cls, *args, base_type: Union[str, type, None] = None, **kwargs):
        if cls is FRSKDRoIHead:
            plain = CascadeRoIHead if 'num_stages' in kwargs else StandardRoIHead
            given = base_type and (registered(base_type) or base_type)
            cls = _with_self_teacher(find_base_type(cls, given, plain, MODELS, 'model.roi_head.base_type'))
        return super().__new__(cls)

    def __init__(
        self,
        *,
        base_type: Union[str, type, None] = None,
        alpha: float = 0.5,
        beta: float = 1.0,
        temperature: float = 1.0,
        depth: int = 1,
        repeats: int = 1,
        **kwargs,
    ):
        at_least_zero('FRSKDRoIHead', alpha=alpha, beta=beta)
        positive('FRSKDRoIHead', temperature=temperature)
        if base_type is None:
            check_replaced_head('FRSKDRoIHead', self.plain_type, kwargs)
        check_box_heads('FRSKDRoIHead', kwargs)
        super().__init__(**kwargs)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        extractors = per_stage(getattr(self, 'bbox_roi_extractor', None))
        self.levels = self._checked_levels(extractors)
        channels = [extractors[0].out_channels] * self.levels
        readers, heads = (
            # Where the config has one for all stages, each stage has one of its own like it, as in the toolkit.
            per_stage(kwargs[name]) * (len(extractors) if len(per_stage(kwargs[name])) == 1 else 1)
            for name in ('bbox_roi_extractor', 'bbox_head')
        )
        # All that is for training only is in here: what selfkd publish drops.
        with _own_random_state(self):
            self.self_teacher = SelfTeacher(
                {
                    'pyramid': BiFPN(channels, channels, depth=depth, repeats=repeats),
                    'roi_extractor': ModuleList(
                        MODELS.build({**reader, 'roi_layer': _one_sample(reader['roi_layer'])}) for reader in readers
                    ),
                    'bbox_head': ModuleList(MODELS.build(_classifier(head)) for head in heads),
                }
            )

    def _checked_levels(self, extractors: list) -> int:
        """How many levels of the pyramid are read; ValueError where the self-teacher cannot teach."""
        levels = [getattr(extractor, 'num_inputs', 0) for extractor in extractors]
        if min(levels) < 2 or self.with_shared_head:
            raise ValueError(
                f'FRSKDRoIHead: regions are read from {min(levels)} level(s), but the self-teacher refines a pyramid '
                'of two or more: use a detector with a neck (FPN), or PSKDHook or CSKDHook'
            )
        for head in per_stage(self.bbox_head):
            check_region_loss('FRSKDRoIHead', head)
        return max(levels)

    def __reduce__(self):
        """To copy and pickle: the class is made when it is needed."""
        return _empty, (self.plain_type,), self.__dict__

    def bbox_loss(self, *args, **kwargs) -> dict:
        results = super().bbox_loss(*args, **kwargs)
        if self._classified is not None:
            self._classified.append((results['cls_score'], kwargs.get('sampling_results', args and args[-1])))
        return results

    def loss(self, x, rpn_results_list, batch_data_samples) -> dict:
        """As the toolkit's, with the self-teacher's losses beside; a validation loss, in evaluation mode or without
        gradients, is the toolkit's."""
        if not (self.training and torch.is_grad_enabled()):
            return super().loss(x, rpn_results_list, batch_data_samples)
        self._classified = []
        losses = super().loss(x, rpn_results_list, batch_data_samples)
        stages, self._classified = self._classified, None  # lets go of the graph
        if not stages:
            raise RuntimeError(
                f'FRSKDRoIHead: {self.plain_type.__name__} computed its losses without a call of bbox_loss, so the '
                'self-teacher cannot teach it: leave model.roi_head.type as it is, and train it without FRSKDRoIHead'
            )
        feats = x[: self.levels]
        refined: Any = None
        for stage, (logits, sampling_results) in enumerate(stages):
            rois = bbox2roi([result.priors for result in sampling_results])
            if len(rois) == 0:
                continue
            first = refined is None
            if first:
                refined = self.self_teacher['pyramid'](feats)
            teacher_logits, loss_teacher = self._teach(stage, refined, rois, sampling_results)
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
            terms['loss_teacher'] = loss_teacher
            cascade = isinstance(self, CascadeRoIHead)
            prefix, weight = (f's{stage}.', self.stage_loss_weights[stage]) if cascade else ('', 1)
            losses.update({f'{prefix}{name}': weight * term for name, term in terms.items()})
        return losses

    def _teach(self, stage: int, refined, rois: Tensor, sampling_results: list) -> Tuple[Tensor, Tensor]:
        """The self-teacher's logits of a stage's regions, and its loss on the labels."""
        teacher, extractor = (self.self_teacher[name][stage] for name in ('bbox_head', 'roi_extractor'))
        logits, _ = teacher(extractor(refined[: extractor.num_inputs], rois))
        own = teacher.loss_and_target(logits, None, rois, sampling_results, per_stage(self.train_cfg)[stage])
        return logits, own['loss_bbox']['loss_cls']


@lru_cache(maxsize=None)
def _with_self_teacher(base: type) -> Any:
    return type(f'FRSKD{base.__name__}', (FRSKDRoIHead, base), {'plain_type': base, '__module__': __name__})


def _empty(base: type) -> FRSKDRoIHead:
    kind = _with_self_teacher(base)
    return kind.__new__(kind)


class SelfTeacher(ModuleDict):
    """Initialised as MMDetection initialises the heads in it; the detector starts as it would without it."""

    def init_weights(self) -> None:
        with _own_random_state(self):
            super().init_weights()


def _own_random_state(module):
    """What draws random numbers in here draws them from a copy of the random state."""
    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    return torch.random.fork_rng(devices=list(devices))


def _one_sample(roi_layer: dict) -> dict:
    """One sample for each point: adaptive numbers of them cost several times as much."""
    return {**roi_layer, 'sampling_ratio': 1} if roi_layer['type'] in ('RoIAlign', ops.RoIAlign) else roi_layer


def _classifier(bbox_head: dict) -> dict:
    options = {key: value for key, value in bbox_head.items() if not key.startswith('num_reg_')}
    return {**options, 'with_reg': False}
