"""FRSKD for MMPretrain classifiers: a self-teacher on the feature maps of the backbone's stages, in training only."""

import inspect
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from selfkd.checks import at_least_zero, one_of, positive
from selfkd.losses import FEATURE_LOSSES, frskd_loss, sla_loss
from selfkd.maps import as_map
from selfkd.pyramid import SelfTeacherPyramid
from selfkd_mmengine.base_type import derived_from, find_base_type

from .heads import check_head, check_head_type, has_plain_loss
from .stages import find_stages

__all__ = ['FRSKDImageClassifier', 'SelfTeacher']


@MODELS.register_module()
class FRSKDImageClassifier(ImageClassifier):
    """An ``ImageClassifier`` that in training has a self-teacher on the feature maps of its backbone's stages.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    Backbone, neck and head are those of the config, and keep their names: with the self-teacher dropped
    (``selfkd publish``) its weights load strictly into that config. They start as they would without it.
    Inference does not call the self-teacher. One setting over any config whose ``model.type`` is ``ImageClassifier``::

        model = dict(type='selfkd_mmpretrain.FRSKDImageClassifier')

    Stages and their channels are found by looking at the network (``find_stages``).

    Args:
        self_teacher: options of ``SelfTeacher``; ``stages``: the names of the backbone's modules whose outputs are
            the feature maps, fine to coarse, where others than those found are wanted; and ``base_type``: the type that
            the config had, where that is a class of your own made from ``ImageClassifier``, which goes on doing what it
            did.
        kwargs: of ``ImageClassifier``, or ``base_type``.

    Losses: ``loss_cls`` (the head's own), ``loss_teacher`` (the self-teacher on the labels), ``loss_kd``,
    ``loss_feature``; with SLA also ``loss_joint`` and ``loss_sla``, each the sum over both classifiers. In evaluation
    mode or without gradients (a validation loss) they are those of the plain model.

    Raises:
        ValueError: the config is no ``ImageClassifier``'s, the head does not train one softmax over classes as
            ``ClsHead`` does, or the backbone has no feature maps of two sizes or more (a ViT).
    """

    def __new__(cls, *args, self_teacher: Optional[dict] = None, **kwargs):
        if cls is FRSKDImageClassifier and kwargs:  # copies are made without arguments
            given = (self_teacher or {}).get('base_type')
            cls = derived_from(cls, find_base_type(cls, given, ImageClassifier, MODELS, 'self_teacher.base_type'))
        return super().__new__(cls)

    def __init__(self, *, self_teacher: Optional[dict] = None, **kwargs):
        check_head_type('FRSKDImageClassifier', kwargs.get('head'))
        known = list(inspect.signature(ImageClassifier.__init__).parameters)[1:]
        foreign = sorted(set(kwargs) - set(known)) if type(self) is FRSKDImageClassifier else []
        own = ['base_type', 'stages', *list(inspect.signature(SelfTeacher.__init__).parameters)[4:]]
        misplaced = [name for name in own if name in foreign]
        if misplaced:
            raise ValueError(
                f'FRSKDImageClassifier: {", ".join(misplaced)}: the settings of the method belong to self_teacher, so '
                f'write model.self_teacher.{misplaced[0]}'
            )
        unknown = sorted(set(self_teacher or {}).difference(own))
        if unknown:
            raise ValueError(f'FRSKDImageClassifier: self_teacher has no setting {", ".join(unknown)}, but {own}')
        if foreign or 'backbone' not in kwargs:
            raise ValueError(
                f'FRSKDImageClassifier: stands for an ImageClassifier, whose settings are {known}, got '
                f'{foreign or sorted(kwargs)}: the config is of another type of model, which has no such backbone and '
                'classifier to distil (of timm, take an ImageClassifier with the backbone TIMMBackbone)'
            )
        super().__init__(**kwargs)
        self._check_head()
        options = dict(self_teacher or {})
        options.pop('base_type', None)
        self._stages, num_classes = find_stages(self, options.pop('stages', None))
        with torch.random.fork_rng(devices=[]):  # what is drawn after it is what would be drawn without it
            torch.default_generator.manual_seed(torch.initial_seed() + 1)
            channels = [stage.channels for stage in self._stages]
            self.self_teacher = SelfTeacher(channels, num_classes, self.head.loss_module, **options)

    def _check_head(self) -> None:
        check_head('FRSKDImageClassifier', self)
        if not has_plain_loss(self.head):
            raise ValueError(
                f'FRSKDImageClassifier: {type(self.head).__name__} computes a loss of its own, and not as ClsHead '
                'does: use a LinearClsHead or the like'
            )

    def init_weights(self) -> None:
        """As the config says, but for the self-teacher, which keeps torch's initialisation, as released.

        An ``init_cfg`` of the model (Swin's, ConvNeXt's) would redraw every linear layer below it.
        """
        self_teacher = self._modules.pop('self_teacher')
        super().init_weights()
        self.self_teacher = self_teacher

    def loss(self, inputs: Tensor, data_samples: List[DataSample]) -> dict:
        """Losses of a batch, see the class."""
        if not (self.training and torch.is_grad_enabled()):
            return super().loss(inputs, data_samples)
        teacher, calls = self.self_teacher, []
        if self.head.loss_module is not teacher.loss_module:  # MMPretrain's SwitchRecipeHook exchanges it
            self._check_head()
            teacher.follow(self.head.loss_module)
        tap = self.head.loss_module.register_forward_pre_hook(
            lambda module, *call: calls.append(call), with_kwargs=True
        )
        try:
            with self._tapped(inputs, until=calls) as maps:
                losses = super().loss(inputs, data_samples)
        finally:
            tap.remove()
        if len(calls) != 1:
            raise RuntimeError(
                f'FRSKDImageClassifier: {type(self).__mro__[1].__name__} called the loss module of '
                f'{type(self.head).__name__} {len(calls)} times in a training step, and not once: which logits to '
                'teach is not known'
            )
        cls_score, target = calls[0][0][:2]
        rotated = None
        if teacher.sla:
            if target.dim() != 1 or inputs.shape[2] != inputs.shape[3]:
                raise ValueError(
                    'FRSKDImageClassifier: self_teacher.sla needs class ids (without Mixup, CutMix, ...: remove '
                    f'augments from model.train_cfg) and square images, got {tuple(inputs.shape[2:])} and targets '
                    f'{tuple(target.shape)}'
                )
            turned = torch.stack([inputs.rot90(k, (2, 3)) for k in range(4)], 1).flatten(0, 1)
            with self._tapped(turned) as rotated:
                self.backbone(turned)
        losses['loss_cls'] = losses.pop('loss')  # mmengine logs the sum as 'loss'
        losses.update(teacher.loss(maps, calls[0], rotated))
        return losses

    @contextmanager
    def _tapped(self, inputs: Tensor, until: Sequence = ()) -> Iterator[List[Tensor]]:
        """A list that holds the stages' maps, fine to coarse, once the backbone has run on the inputs.

        What runs after ``until`` has something in it (CSKDHook's partners, at the loss) is not looked at.
        """
        size, passes = inputs.shape[2:], []
        maps: List[Any] = [None] * len(self._stages)

        def count(*call) -> None:
            if not until:
                passes.append(call)

        def keep(i: int, x: Tensor) -> None:
            if not until:
                maps[i] = as_map(x, size)

        handles = [self.backbone.register_forward_pre_hook(count)]
        for i, stage in enumerate(self._stages):
            if self.self_teacher.preact and stage.relu:  # which may work in place
                module = self.backbone.get_submodule(stage.relu)
                hook = module.register_forward_pre_hook(lambda m, args, i=i: keep(i, args[0].clone()))
            else:
                module = self.backbone.get_submodule(stage.module)
                hook = module.register_forward_hook(
                    lambda m, args, out, i=i, stage=stage: keep(i, out if stage.index is None else out[stage.index])
                )
            handles.append(hook)
        try:
            yield maps
        finally:
            for handle in handles:
                handle.remove()
        if len(passes) > 1:
            raise RuntimeError(
                f'FRSKDImageClassifier: the backbone ran {len(passes)} times before the loss, so which feature maps '
                'belong to the loss is not known: FRSKD needs a model that classifies from one pass'
            )
        missing = [stage.module for stage, x in zip(self._stages, maps) if x is None]
        if missing:
            raise RuntimeError(
                f'FRSKDImageClassifier: {missing} of {type(self.backbone).__name__} gave no feature maps for images of '
                f'{tuple(size)} pixels: name other modules in self_teacher.stages'
            )


class SelfTeacher(nn.Module):
    """FRSKD's self-teacher for classifiers: a [`selfkd.pyramid.SelfTeacherPyramid`][] and what its losses need.

    Args:
        in_channels: channels of the feature maps, fine to coarse.
        num_classes: C.
        loss_module: the head's, which is that of its own classifier, too.
        alpha: weight of the KL from the self-teacher's prediction, the paper's for CIFAR-100 is 2.
        beta: weight of the feature loss, the paper's for CIFAR-100 is 100; 0 for soft labels only.
        temperature: T.
        feature_loss: ``'attention'`` (attention transfer), ``'hint'`` (FitNet; with learnt adapters) or ``'overhaul'``
            (with learnt adapters; of the maps before the stages' last ReLU, where a stage ends in one).
        width: of the pyramid, times ``in_channels``.
        depth: separable convolutions per fusion in the pyramid.
        repeats: passes of the pyramid.
        sla: weight of self-supervised label augmentation, the released code's is 1; 0 is none. The images in four
            rotations, four times as many, go through the backbone in a pass of their own.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        loss_module: nn.Module,
        *,
        alpha: float = 2.0,
        beta: float = 100.0,
        temperature: float = 4.0,
        feature_loss: str = 'attention',
        width: int = 2,
        depth: int = 2,
        repeats: int = 1,
        sla: float = 0.0,
    ):
        one_of('self_teacher', tuple(FEATURE_LOSSES), feature_loss=feature_loss)
        at_least_zero('self_teacher', alpha=alpha, beta=beta, sla=sla)
        positive('self_teacher', temperature=temperature)
        super().__init__()
        self.follow(loss_module)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.feature_loss, self.preact, self.sla = feature_loss, feature_loss == 'overhaul', sla
        self.pyramid = SelfTeacherPyramid(in_channels, num_classes, width=width, depth=depth, repeats=repeats)
        self.adapters = None
        if beta and feature_loss != 'attention':
            pairs = zip(in_channels, self.pyramid.channels)
            self.adapters = nn.ModuleList(_adapter(*pair, relu=feature_loss == 'hint') for pair in pairs)
        if sla:
            self.joint = nn.Linear(in_channels[-1], 4 * num_classes)
            self.teacher_joint = nn.Linear(self.pyramid.channels[-1], 4 * num_classes)

    @property
    def loss_module(self) -> nn.Module:
        return self._loss_module[0]

    def follow(self, loss_module: nn.Module) -> None:
        """From now on, another loss module of the head."""
        self._loss_module = (loss_module,)  # in a tuple: it is the head's sub-module

    def loss(self, maps: List[Tensor], call: Tuple[tuple, dict], rotated: Optional[List[Tensor]]) -> Dict[str, Tensor]:
        """Losses of a batch.

        Args:
            maps: the student's, ``[B, C_i, H_i, W_i]``, fine to coarse.
            call: arguments of the head's loss module: logits ``[B, C]``, the target, ...
            rotated: the maps of the images in four rotations, with SLA.
        """
        (cls_score, target, *args), kwargs = call
        feats, refined, teacher_score = self._refined(maps)
        # Not by a call, which torch hooks (PSKDHook's, CSKDHook's) would take for the classifier's.
        losses = {'loss_teacher': self.loss_module.forward(teacher_score, target, *args, **kwargs)}
        if rotated is not None:
            rotated, refined_rotated, _ = self._refined(rotated)
            own, teachers = (
                sla_loss(joint(F.relu(x[-1]).mean((2, 3))), z, target, weight=self.sla, temperature=self.temperature)
                for joint, x, z in (
                    (self.joint, rotated, cls_score),
                    (self.teacher_joint, refined_rotated, teacher_score),
                )
            )
            losses['loss_joint'], losses['loss_sla'] = own[0] + teachers[0], own[1] + teachers[1]
            # As released, the self-teacher's prediction and maps teach the rotated images, too.
            cls_score, teacher_score = torch.cat([cls_score, own[2]]), torch.cat([teacher_score, teachers[2]])
            feats = [torch.cat(pair) for pair in zip(feats, rotated)]
            refined = [torch.cat(pair) for pair in zip(refined, refined_rotated)]
        if self.adapters is not None:
            feats = [adapter(f) for adapter, f in zip(self.adapters, feats)]
        weights: Dict[str, Any] = dict(alpha=self.alpha, beta=self.beta, temperature=self.temperature)
        terms = frskd_loss(cls_score, teacher_score, feats, refined, None, feature_loss=self.feature_loss, **weights)
        losses.update(terms)
        return losses

    def _refined(self, maps: List[Tensor]) -> Tuple[List[Tensor], List[Tensor], Tensor]:
        """The maps F_i, the refined ones T_i and the logits; F_i after their ReLU but for the overhaul loss."""
        feats = list(maps) if self.preact else [F.relu(x) for x in maps]
        return (feats, *self.pyramid(feats, preact=self.preact))


def _adapter(in_channels: int, out_channels: int, relu: bool) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')  # as released
    layers = [conv, nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))
