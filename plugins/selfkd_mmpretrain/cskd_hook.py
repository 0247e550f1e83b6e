"""CS-KD for MMPretrain classifiers."""

from typing import Any, Dict, List, Tuple

import torch
from mmengine.runner import BaseLoop, Runner
from mmpretrain.registry import HOOKS
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from selfkd.checks import at_least_zero, positive
from selfkd.losses import cskd_loss
from selfkd.transfer import to_host
from selfkd_mmengine.hook import is_iter_based
from selfkd_mmengine.pair_sampler import PairBatchSampler, with_batch_sampler

from .heads import ClassifierHook, logits_and_target, logits_of

__all__ = ['CSKDHook']


class PairedHook(ClassifierHook):
    """What hooks share whose batches are pairs: the data loader, and what to refuse."""

    batch_sampler: type

    def before_run(self, runner: Runner) -> None:
        super().before_run(runner)
        if not isinstance(runner._train_loop, BaseLoop):  # validation or test
            return
        if any(isinstance(hook, PairedHook) and hook is not self for hook in runner.hooks):
            raise ValueError(
                'CSKDHook, DDGSDHook: both pair the samples of a batch, in different ways: use one of the two hooks'
            )
        loader = runner.train_loop.dataloader
        if not isinstance(loader.batch_sampler, self.batch_sampler):
            loader = runner.train_loop.dataloader = self._paired(runner, loader)
        # PreciseBNHook reads it; of a loader with a batch sampler it is None, and torch lets nobody set it.
        object.__setattr__(loader, 'batch_size', loader.batch_sampler.batch_size)

    def _paired(self, runner: Runner, loader: DataLoader) -> DataLoader:
        if is_iter_based(runner) or type(loader.batch_sampler) is not BatchSampler:
            raise ValueError(
                f'{type(self).__name__}: the training loop is iteration-based or has a batch sampler of its own, so '
                'the data loader must yield the pairs: set train_dataloader.batch_sampler='
                f"dict(type='selfkd_mmengine.{self.batch_sampler.__name__}')"
            )
        return with_batch_sampler(loader, self.batch_sampler)

    def check(self, runner: Runner, model: nn.Module) -> None:
        super().check(runner, model)
        if getattr(model.data_preprocessor, 'batch_augments', None) is not None:
            raise ValueError(
                f'{type(self).__name__}: batch augmentations (Mixup, CutMix, ...) mix samples, and a mixed sample has '
                'no partner (of its class, or of the same image): remove batch_augments from model.train_cfg / '
                'data_preprocessor'
            )

    def setup(self, runner: Runner, model: nn.Module) -> None:
        self._model = model

    def labels_of_pairs(self, data_batch: dict) -> Tensor:
        """Labels ``[B]`` of the first half of a batch; refuses samples that are not paired any more."""
        samples = data_batch['data_samples']
        labels = torch.cat([sample.gt_label for sample in samples])
        self.refuse_moved(*(labels[i : i + len(samples) // 2] for i in (0, len(samples) // 2)))
        return labels[: len(samples) // 2]

    def refuse_moved(self, labels: Tensor, others: Tensor) -> None:
        if not torch.equal(labels, others.to(labels)):
            raise ValueError(
                f'{type(self).__name__}: the samples of a batch are not the pairs that its sampler chose, or not in '
                f'its order: the first half has the labels {labels[:8].tolist()}..., beside it are '
                f'{others[:8].tolist()}.... Does the collate function, the data set, the pipeline or the data '
                'preprocessor sort, drop or replace samples? Leave them as they are, or train without this hook'
            )


@HOOKS.register_module()
class CSKDHook(PairedHook):
    """Class-wise self-knowledge distillation for any classifier whose head has a ``loss_module``.

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020
    https://arxiv.org/abs/2003.13964

    Each sample of a batch (an anchor) gets a partner of its class, drawn from the whole training set, and the loss gets
    ``weight * T^2 * KL(partner || anchor)`` beside the head's own. The partners go through the network in a pass of
    their own, in training mode (with batch-norm statistics of their own, which enter the running statistics) and
    without gradient. The hook turns on all of it::

        default_hooks = dict(cskd=dict(type='selfkd_mmpretrain.CSKDHook', weight=1.0, temperature=4.0))

    In an iteration-based loop the data loader's config must ask for the pairs as well:
    ``train_dataloader=dict(batch_sampler=dict(type='selfkd_mmengine.PairBatchSampler'))``.

    Args:
        weight: lambda, at least 0; 1 for 32 x 32 images in the paper, 3 for fine-grained data sets at 224 x 224.
        temperature: T. Defaults to 4, the paper's.

    Losses: ``loss_cskd``, the distillation term with its weight, beside the head's own ``loss``; they are summed.

    Raises:
        ValueError: at the start of training, for what cannot work; each message says what to change.
    """

    # Takes the partners out of the batch before hooks of NORMAL priority look at it.
    priority = 'ABOVE_NORMAL'
    batch_sampler = PairBatchSampler

    def __init__(self, weight: float = 1.0, *, temperature: float = 4.0):
        super().__init__()
        positive('CSKDHook', temperature=temperature)
        at_least_zero('CSKDHook', weight=weight)
        self.temperature, self.weight = temperature, weight

    def setup(self, runner: Runner, model: nn.Module) -> None:
        super().setup(runner, model)
        # Labels of anchors, targets that the loss saw, the event after which they are there.
        self._to_compare: List[Tuple[Tensor, Tensor, Any]] = []

    def before_train_iter(self, runner: Runner, batch_idx, data_batch=None) -> None:
        super().before_train_iter(runner, batch_idx, data_batch)
        labels = self.labels_of_pairs(data_batch)
        pairs = len(labels)
        self._partners = {key: value[pairs:] for key, value in data_batch.items()}
        for key, value in data_batch.items():
            data_batch[key] = value[:pairs]
        self._labels = labels

    def _compare_targets(self, target: Tensor) -> None:
        """Refuses targets that are not the anchors' labels; of an accelerator a step or two later, without waiting."""
        (target,), event = to_host(target.detach() if target.dim() == 1 else target.detach().argmax(1))
        self._to_compare.append((self._labels, target, event))
        while self._to_compare and (self._to_compare[0][2] is None or self._to_compare[0][2].query()):
            labels, target, _ = self._to_compare.pop(0)
            self.refuse_moved(labels, target)

    def rewrite_loss(self, arguments: Dict[str, Any], loss: Tensor) -> Tensor:
        self._compare_targets(logits_and_target(arguments)[1])
        if self.weight == 0:
            return loss
        # After the anchors' pass, as in the released code; also, autocast keeps the weights that the first pass casts,
        # which must be one with gradient. Not through the model's __call__: this is no training step.
        with torch.no_grad():
            inputs = self._model.data_preprocessor(self._partners, True)['inputs']
            partner_logits = logits_of(self._model, inputs)
        # An entry of its own, which the toolkit adds: what other hooks make of the head's loss does not touch it.
        logits = logits_and_target(arguments)[0]
        options = dict(weight=self.weight, temperature=self.temperature)
        self.logs['loss_cskd'] = cskd_loss(logits, None, partner_logits, **options)
        return loss
