"""FRSKD for MMPretrain classifiers: a linear head with a self-teacher that is there in training only."""

from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from selfkd.losses import FEATURE_LOSSES, frskd_loss, sla_loss
from selfkd.pyramid import SelfTeacherPyramid
from selfkd.checks import at_least_zero, positive

__all__ = ['FRSKDClsHead', 'SLAImageClassifier']


@MODELS.register_module()
class FRSKDClsHead(LinearClsHead):
    """Feature refinement via self-knowledge distillation.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    It takes the feature maps of several stages and classifies from the last one exactly as global average pooling and a
    ``LinearClsHead`` do, with the same parameter names, so its weights load into that model
    (``tools/publish_model.py`` drops the self-teacher). In training a :class:`selfkd.pyramid.SelfTeacherPyramid`
    learns beside it and teaches it::

        model = dict(
            backbone=dict(out_indices=(0, 1, 2, 3)),
            neck=None,
            head=dict(type='selfkd_mmpretrain.FRSKDClsHead', in_channels=[64, 128, 256, 512], num_classes=100),
        )

    Args:
        num_classes: C.
        in_channels: channels of the feature maps, fine to coarse.
        alpha: weight of the KL from the self-teacher's prediction, the paper's for CIFAR-100 is 2.
        beta: weight of the feature loss, the paper's for CIFAR-100 is 100; 0 for soft labels only.
        temperature: T.
        feature_loss: ``'attention'`` (attention transfer), ``'hint'`` (FitNet; with learnt adapters) or ``'overhaul'``.
        width: of the self-teacher, times ``in_channels``.
        depth: separable convolutions per fusion in the self-teacher.
        repeats: passes of the self-teacher.
        preact: the backbone hands over maps before their last ReLU (``preact=True`` of our CIFAR backbones); the
            classifier then applies it. ``feature_loss='overhaul'`` compares such maps in the released code.
        sla: weight of self-supervised label augmentation, the released code's is 1; 0 is none. The model's type must
            then be :class:`SLAImageClassifier`.
        loss: of the classifier, and by itself of the self-teacher. Defaults to cross-entropy.
        kwargs: other options of ``LinearClsHead``.

    Losses: ``loss_cls``, ``loss_teacher`` (the self-teacher on the labels), ``loss_kd``, ``loss_feature``; with SLA
    also ``loss_joint`` and ``loss_sla``, each the sum over both classifiers.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        alpha: float = 2.0,
        beta: float = 100.0,
        temperature: float = 4.0,
        feature_loss: str = 'attention',
        width: int = 2,
        depth: int = 2,
        repeats: int = 1,
        preact: bool = False,
        sla: float = 0.0,
        loss: dict = dict(type='CrossEntropyLoss', loss_weight=1.0),  # noqa: B006, as in MMPretrain
        **kwargs,
    ):
        if isinstance(in_channels, int) or len(in_channels) < 2:
            raise ValueError(
                f'FRSKDClsHead: in_channels must list the channels of at least 2 stages, got {in_channels}'
            )
        if feature_loss not in FEATURE_LOSSES:
            raise ValueError(f'FRSKDClsHead: feature_loss must be one of {tuple(FEATURE_LOSSES)}, got {feature_loss!r}')
        at_least_zero('FRSKDClsHead', alpha=alpha, beta=beta, sla=sla)
        positive('FRSKDClsHead', temperature=temperature)
        super().__init__(num_classes, in_channels[-1], loss=loss, **kwargs)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.feature_loss, self.preact, self.sla = feature_loss, preact, sla
        pyramid = SelfTeacherPyramid(in_channels, num_classes, width=width, depth=depth, repeats=repeats)
        # All that is for training only is in here: what tools/publish_model.py drops.
        self.self_teacher = nn.ModuleDict({'pyramid': pyramid, 'loss_module': MODELS.build(loss)})
        if beta and feature_loss != 'attention':
            self.self_teacher['adapters'] = nn.ModuleList(
                _adapter(c, out, relu=feature_loss == 'hint') for c, out in zip(in_channels, pyramid.channels)
            )

        if sla:
            self.self_teacher['joint'] = nn.Linear(in_channels[-1], 4 * num_classes)
            self.self_teacher['teacher_joint'] = nn.Linear(pyramid.channels[-1], 4 * num_classes)

    def pre_logits(self, feats: Tuple[Tensor]) -> Tensor:
        last = feats[-1]
        if last.dim() != 4:
            raise ValueError(
                f'FRSKDClsHead: needs feature maps [B, C, H, W], got {tuple(last.shape)}: set model.neck=None (the '
                'head pools)'
            )
        if self.preact:
            last = F.relu(last)
        return F.adaptive_avg_pool2d(last, 1).flatten(1)

    def loss(
        self, feats: Tuple[Tensor], data_samples: List[DataSample], rotated: Optional[Tuple[Tensor]] = None, **kwargs
    ) -> dict:
        """Losses of a batch; ``rotated`` are the feature maps of its images in four rotations (for SLA)."""
        if bool(self.sla) != (rotated is not None):
            raise ValueError(
                'FRSKDClsHead: sla and the model type belong together: with sla set '
                "model.type='selfkd_mmpretrain.SLAImageClassifier', without it 'ImageClassifier'"
            )
        cls_score, target = self(feats), target_of(data_samples)
        losses = self._get_loss(cls_score, data_samples, **kwargs)
        losses['loss_cls'] = losses.pop('loss')  # mmengine logs the sum as 'loss'
        overhaul = self.feature_loss == 'overhaul'
        refined, teacher_score = self.self_teacher['pyramid'](feats, preact=overhaul)
        losses['loss_teacher'] = self.self_teacher['loss_module'](
            teacher_score, target, avg_factor=len(teacher_score), **kwargs
        )
        if rotated is not None:
            if target.dim() != 1:
                raise ValueError(
                    'FRSKDClsHead: sla needs class ids, but Mixup, CutMix, ... mix labels: remove batch_augments'
                )
            refined_rotated, _ = self.self_teacher['pyramid'](rotated, preact=overhaul)
            pooled = F.relu(refined_rotated[-1]).mean((2, 3))
            own = sla_loss(
                self.self_teacher['joint'](self.pre_logits(rotated)),
                cls_score,
                target,
                weight=self.sla,
                temperature=self.temperature,
            )
            teachers = sla_loss(
                self.self_teacher['teacher_joint'](pooled),
                teacher_score,
                target,
                weight=self.sla,
                temperature=self.temperature,
            )
            losses['loss_joint'], losses['loss_sla'] = own[0] + teachers[0], own[1] + teachers[1]
            # As released, the self-teacher's prediction and maps teach the rotated images, too.
            cls_score, teacher_score = torch.cat([cls_score, own[2]]), torch.cat([teacher_score, teachers[2]])
            feats = [torch.cat(pair) for pair in zip(feats, rotated)]
            refined = [torch.cat(pair) for pair in zip(refined, refined_rotated)]
        students = feats
        if 'adapters' in self.self_teacher:
            students = [adapter(f) for adapter, f in zip(self.self_teacher['adapters'], feats)]
        elif self.preact:
            students = [F.relu(f) for f in feats]
        losses.update(
            frskd_loss(
                cls_score,
                teacher_score,
                students,
                refined,
                None,
                alpha=self.alpha,
                beta=self.beta,
                temperature=self.temperature,
                feature_loss=self.feature_loss,
            )
        )
        return losses


@MODELS.register_module()
class SLAImageClassifier(ImageClassifier):
    """An ``ImageClassifier`` that in training also hands its head the feature maps of the images in four rotations.

    For ``FRSKDClsHead(sla=...)``. The rotated images, four times as many, go through the network in a pass of their
    own. Inference is ImageClassifier's; parameter names are, too.
    """

    def loss(self, inputs: Tensor, data_samples: List[DataSample]) -> dict:
        if inputs.shape[2] != inputs.shape[3]:
            raise ValueError(f'SLAImageClassifier: needs square images, got {inputs.shape[2]} x {inputs.shape[3]}')
        feats = self.extract_feat(inputs)
        rotated = torch.stack([inputs.rot90(k, (2, 3)) for k in range(4)], 1).flatten(0, 1)
        return self.head.loss(feats, data_samples, rotated=self.extract_feat(rotated))


def target_of(data_samples: List[DataSample]) -> Tensor:
    """What MMPretrain's heads train on: class ids ``[B]``, or after batch augmentation scores ``[B, C]``."""
    if 'gt_score' in data_samples[0]:
        return torch.stack([sample.gt_score for sample in data_samples])
    return torch.cat([sample.gt_label for sample in data_samples])


def _adapter(in_channels: int, out_channels: int, relu: bool) -> nn.Sequential:
    layers = [nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))
