"""BYOT for MMPretrain classifiers, a comparator of the papers' tables."""

from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from selfkd.checks import at_least_zero, positive, share
from selfkd.losses import byot_loss

from .heads import target_of

__all__ = ['BYOTClsHead']


@MODELS.register_module()
class BYOTClsHead(LinearClsHead):
    """Be your own teacher: auxiliary classifiers on shallower stages, taught by the deepest one. Training only.

    Zhang et al., "Be Your Own Teacher", ICCV 2019
    https://arxiv.org/abs/1905.08094

    It takes the maps of several stages (``neck=None``), classifies from the last one exactly as
    pooling and ``LinearClsHead`` do, and ``selfkd publish`` drops the rest.

    Args:
        num_classes: C.
        in_channels: channels of the feature maps, fine to coarse.
        alpha: share of the KL in each auxiliary loss, in [0, 1].
        beta: weight of the squared distance between features.
        temperature: T.
        loss: of every classifier. Defaults to cross-entropy.
        kwargs: other options of ``LinearClsHead``.

    Losses: ``loss_cls``, ``loss_aux``, ``loss_kd``, ``loss_feature``.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        alpha: float = 0.1,
        beta: float = 1e-6,
        temperature: float = 3.0,
        loss: dict = dict(type='CrossEntropyLoss', loss_weight=1.0),  # noqa: B006, as in MMPretrain
        **kwargs,
    ):
        if isinstance(in_channels, int) or len(in_channels) < 2:
            raise ValueError(f'BYOTClsHead: in_channels must list the channels of at least 2 stages, got {in_channels}')
        share('BYOTClsHead', alpha=alpha)
        at_least_zero('BYOTClsHead', beta=beta)
        positive('BYOTClsHead', temperature=temperature)
        super().__init__(num_classes, in_channels[-1], loss=loss, **kwargs)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.auxiliary = nn.ModuleDict(  # training only: what selfkd publish drops
            {
                'branches': nn.ModuleList(_branch(in_channels[i:]) for i in range(len(in_channels) - 1)),
                'fcs': nn.ModuleList(nn.Linear(in_channels[-1], num_classes) for _ in in_channels[1:]),
                'loss_module': MODELS.build(loss),
            }
        )

    def pre_logits(self, feats: Tuple[Tensor]) -> Tensor:
        if feats[-1].dim() != 4:
            raise ValueError(
                f'BYOTClsHead: needs feature maps [B, C, H, W], got {tuple(feats[-1].shape)}: set model.neck=None '
                '(the head pools)'
            )
        return F.adaptive_avg_pool2d(feats[-1], 1).flatten(1)

    def loss(self, feats: Tuple[Tensor], data_samples: List[DataSample], **kwargs) -> dict:
        if not (self.training and torch.is_grad_enabled()):  # a validation loss is the plain one
            return super().loss(feats, data_samples, **kwargs)
        cls_score = self(feats)
        losses = self._get_loss(cls_score, data_samples, **kwargs)
        losses['loss_cls'] = (1 - self.alpha) * losses.pop('loss')  # mmengine logs the sum as 'loss'
        vectors = [F.adaptive_avg_pool2d(b(f), 1).flatten(1) for b, f in zip(self.auxiliary['branches'], feats)]
        scores = [fc(v) for fc, v in zip(self.auxiliary['fcs'], vectors)]
        target, loss = target_of(data_samples), self.auxiliary['loss_module']
        losses['loss_aux'] = (1 - self.alpha) * sum(loss(s, target, avg_factor=len(s), **kwargs) for s in scores)
        losses.update(
            byot_loss(
                cls_score,
                scores,
                self.pre_logits(feats),
                vectors,
                None,
                alpha=self.alpha,
                beta=self.beta,
                temperature=self.temperature,
            )
        )
        return losses


def _branch(channels: Sequence[int]) -> nn.Sequential:
    """Brings a stage's map to the last stage's channels, halving it for each stage between."""
    layers = []
    for c_in, c_out in zip(channels, channels[1:]):
        layers += [
            nn.Conv2d(c_in, c_in, 3, 2, 1, groups=c_in, bias=False),
            nn.Conv2d(c_in, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
