"""DDGSD for MMPretrain classifiers, a comparator of the papers' tables."""

from typing import Any, Dict

from mmengine.runner import Runner
from mmpretrain.registry import HOOKS
from torch import Tensor, nn

from selfkd.checks import at_least_zero, positive
from selfkd.losses import ddgsd_loss
from selfkd_mmengine.pair_sampler import ViewBatchSampler

from .cskd_hook import PairedHook
from .heads import mixes_samples

__all__ = ['DDGSDHook']


@HOOKS.register_module()
class DDGSDHook(PairedHook):
    """Data-distortion guided self-distillation for classifiers with a linear classifier ``head.fc``.

    Xu and Liu, "Data-Distortion Guided Self-Distillation for Deep Neural Networks", AAAI 2019
    https://doi.org/10.1609/aaai.v33i01.33015565

    Every image of a batch is loaded twice, so the random augmentation gives two views. Both are trained on (the head's
    own loss is the mean over them) and drawn together::

        default_hooks = dict(ddgsd=dict(type='selfkd_mmpretrain.DDGSDHook'))

    In an iteration-based loop the data loader's config must ask for the views as well:
    ``train_dataloader=dict(batch_sampler=dict(type='selfkd_mmengine.ViewBatchSampler'))``.

    Args:
        temperature: T.
        weight: of the KL in both directions.
        mmd_weight: of the squared distance between the views' mean features.

    Losses: ``loss_ddgsd``, beside the head's own.

    Raises:
        ValueError: at the start of training, for what cannot work; each message says what to change.
    """

    batch_sampler = ViewBatchSampler

    def __init__(self, temperature: float = 3.0, weight: float = 1.0, mmd_weight: float = 0.005):
        super().__init__()
        positive('DDGSDHook', temperature=temperature)
        at_least_zero('DDGSDHook', weight=weight, mmd_weight=mmd_weight)
        self.temperature, self.weight, self.mmd_weight = temperature, weight, mmd_weight

    def check(self, runner: Runner, model: nn.Module) -> None:
        super().check(runner, model)
        if mixes_samples(model):
            raise ValueError(
                'DDGSDHook: batch augmentations (Mixup, CutMix, ...) mix samples, and a mixed sample has no second '
                'view: remove batch_augments from model.train_cfg / data_preprocessor'
            )
        if not isinstance(getattr(model.head, 'fc', None), nn.Linear):
            raise ValueError(f'DDGSDHook: needs a head with a linear classifier `fc`, got {type(model.head).__name__}')

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self._handles.append(self._model.head.fc.register_forward_pre_hook(self._keep))

    def before_train_iter(self, runner: Runner, batch_idx, data_batch=None) -> None:
        super().before_train_iter(runner, batch_idx, data_batch)
        self.labels_of_pairs(data_batch)

    def _keep(self, module, args) -> None:
        if self._computing_loss:
            self._features = args[0]

    def rewrite_loss(self, arguments: Dict[str, Any], loss: Tensor) -> Tensor:
        one, other = arguments['cls_score'].chunk(2)
        self.logs['loss_ddgsd'] = ddgsd_loss(
            one,
            other,
            *self._features.chunk(2),
            weight=self.weight,
            mmd_weight=self.mmd_weight,
            temperature=self.temperature,
        )
        return loss
