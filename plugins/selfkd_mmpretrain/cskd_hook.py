"""CS-KD for MMPretrain classifiers."""

from contextlib import nullcontext
from typing import Any, Dict, List, Optional, Tuple

import torch
from mmengine.runner import BaseLoop, Runner
from mmpretrain.registry import HOOKS
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from selfkd.checks import at_least_zero, positive
from selfkd.losses import cskd_loss
from selfkd.teacher import as_before, random_states
from selfkd.transfer import to_host
from selfkd_mmengine.hook import is_iter_based
from selfkd_mmengine.pair_sampler import PairBatchSampler, with_batch_sampler

from .heads import ClassifierHook, logits_and_target, logits_of, mixes_samples, target_of

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
                'preprocessor sort, drop or replace samples, or mix them in another way than their partners (whose '
                'images must have the same size)? Leave them as they are, or train without this hook'
            )


@HOOKS.register_module()
class CSKDHook(PairedHook):
    """Class-wise self-knowledge distillation for any classifier whose head has a ``loss_module``.

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020
    https://arxiv.org/abs/2003.13964

    Each sample of a batch (an anchor) gets a partner of its class, drawn from the whole training set, and the loss gets
    ``weight * T^2 * KL(partner || anchor)`` beside the head's own. The partners go through the network in a pass of
    their own, in training mode (with batch-norm statistics of their own, which enter the running statistics) and
    without gradient. Of a head with two classifiers (Conformer) each is taught by its own. Where batches are mixed
    (Mixup, CutMix, ...), partners are mixed as their anchors are, so that a mixed partner has the classes of the mixed
    anchor; this combination is not the paper's. The hook turns on all of it::

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
    several = True

    def __init__(self, weight: float = 1.0, *, temperature: float = 4.0):
        super().__init__()
        positive('CSKDHook', temperature=temperature)
        at_least_zero('CSKDHook', weight=weight)
        self.temperature, self.weight = temperature, weight

    def setup(self, runner: Runner, model: nn.Module) -> None:
        super().setup(runner, model)
        # Labels of anchors (mixed: of partners), those that the loss saw, the event after which they are there.
        self._to_compare: List[Tuple[Tensor, Tensor, Any]] = []
        self._partner_logits: Optional[List[Tensor]] = None
        self._device = next(model.parameters()).device

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self._handles.append(self._model.data_preprocessor.register_forward_pre_hook(self._before_mixing))

    def _before_mixing(self, preprocessor, args) -> None:
        if self._waiting and mixes_samples(self._model):  # of the anchors; of the partners they are the same
            self._states = random_states(self._device)

    def before_train_iter(self, runner: Runner, batch_idx, data_batch=None) -> None:
        super().before_train_iter(runner, batch_idx, data_batch)
        labels = self.labels_of_pairs(data_batch)
        pairs = len(labels)
        self._partners = {key: value[pairs:] for key, value in data_batch.items()}
        for key, value in data_batch.items():
            data_batch[key] = value[:pairs]
        self._labels, self._partner_logits, self.logs = labels, None, {}

    def _compare(self, expected: Tensor, found: Tensor) -> None:
        """Refuses labels that are not the expected ones; on an accelerator a step or two later, without waiting."""
        (found, expected), event = to_host(found, expected)
        self._to_compare.append((expected, found, event))
        while self._to_compare and (self._to_compare[0][2] is None or self._to_compare[0][2].query()):
            expected, found, _ = self._to_compare.pop(0)
            self.refuse_moved(expected, found)

    def rewrite_loss(self, arguments: Dict[str, Any], loss: Tensor) -> Tensor:
        logits, target = logits_and_target(arguments)
        mixes = mixes_samples(self._model)
        if not mixes:
            self._compare(self._labels, target.detach() if target.dim() == 1 else target.detach().argmax(1))
        if self.weight == 0:
            return loss
        if self._partner_logits is None:
            # After the anchors' pass, as in the released code; also, autocast keeps the weights that the first pass
            # casts, which must be one with gradient. Not through the model's __call__: this is no training step.
            with torch.no_grad():
                with as_before(self._states, self._device) if mixes else nullcontext():
                    partners = self._model.data_preprocessor(self._partners, True)
                self._partner_logits = logits_of(self._model, partners['inputs'])
            if mixes:  # as the anchors were
                self._compare(_mean_class(target), _mean_class(target_of(partners['data_samples'])))
        assert self._partner_logits is not None
        assert self.place is not None
        options = dict(weight=self.weight, temperature=self.temperature)
        term = cskd_loss(logits, None, self._partner_logits[self.place], **options)
        # An entry of its own, which the toolkit adds: what other hooks make of the head's loss does not touch it.
        self.logs['loss_cskd'] = self.logs.get('loss_cskd', 0) + term
        return loss


def _mean_class(scores: Tensor) -> Tensor:
    """Tells mixed labels ``[B, C]`` apart: ``[B]``."""
    return scores.detach().double() @ torch.arange(scores.shape[1], dtype=torch.float64, device=scores.device)
