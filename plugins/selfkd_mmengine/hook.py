"""The base of every self-distillation hook for OpenMMLab toolkits: one tap on the toolkit's own loss module.

The tap is a torch forward hook on the loss module, live only while the model computes the loss of a training iteration.
No class, parameter, buffer or checkpoint key of the model changes; validation (its losses, too) and inference are
untouched.
"""

import inspect
import math
import os
import re
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from mmengine.dataset import DefaultSampler
from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner, find_latest_checkpoint
from torch import Tensor, nn

from selfkd.teacher import unwrap

__all__ = ['SelfKDHook', 'epoch_length', 'is_iter_based', 'only_looks', 'training_progress']

CHECKPOINT_KEY = 'selfkd'
STRATEGIES = ('SingleDeviceStrategy', 'DDPStrategy', 'FSDPStrategy')  # of FlexibleRunner: plain calls of a torch module


class SelfKDHook(Hook):
    """Taps the loss module and rewrites its value; keeps what it needs in the checkpoint.

    A subclass says where to tap (``loss_module``), what to refuse (``check``, ``check_batch``), and what
    the loss becomes (``rewrite_loss``); it may look at the batch (``before_train_iter``, which must call this
    class's), at the preprocessed inputs (``before_forward``) and keep state (``state_dict``,
    ``load_state_dict``).

    A training iteration has one loss: the model's first ``mode='loss'`` call with gradients after
    ``before_train_iter``. Other calls (a validation loss, whoever computes it and when) are plain; a second one of the
    iteration with gradients and in training mode is an error.
    """

    # Whether every training step calls the loss module; where images may have nothing to classify, only the first must.
    fires_every_step = True
    # Whether a step may call a loss module several times (one-stage detectors do, once for each level of the pyramid).
    many_calls = False
    # Names of the logged values that are averaged over the logger's window, as losses are; others show the last one.
    averaged: Tuple[str, ...] = ()
    priority = 'NORMAL'  # before CheckpointHook (VERY_LOW), so that what it saves is of this step

    def __init__(self):
        self.logs: Dict[str, Tensor] = {}
        self.tapped: Any = None  # a loss module of the toolkit, once training has begun
        self._handles, self._loss_handles = [], []
        self._watched: List[object] = []
        self._waiting = self._computing_loss = self._looking = False
        self._forwards, self._taps = 0, set()
        self._resumed_state: Optional[dict] = None

    # What a subclass says.

    def loss_module(self, model: nn.Module) -> nn.Module:
        """The module whose call is the classification loss."""
        raise NotImplementedError

    def loss_modules(self, model: nn.Module) -> List[nn.Module]:
        """All such modules, for models with several stages; a training step calls each once (see ``many_calls``)."""
        return [self.loss_module(model)]

    def check(self, runner: Runner, model: nn.Module) -> None:
        """Refuses what cannot work; ``model`` is unwrapped.

        Before the first step, and again whenever something of ``watched`` has changed.
        """

    def check_batch(self, arguments: Dict[str, Any], loss: Tensor) -> None:
        """Refuses what a batch shows, given what ``rewrite_loss`` gets.

        Called with the first batch of a run, of each epoch, and after a change.
        """

    def watched(self, model: nn.Module) -> List[object]:
        """What hooks (MMPretrain's SwitchRecipeHook) and users may exchange in the middle of a run."""
        return [*self.loss_modules(model), getattr(model.data_preprocessor, 'batch_augments', None)]

    def setup(self, runner: Runner, model: nn.Module) -> None:
        """Makes what the hook needs, once weights are initialised or resumed and before the tap is set."""

    def before_forward(self, inputs) -> None:
        """Called with the preprocessed (augmented, mixed) inputs of a training forward pass."""

    def rewrite_loss(self, arguments: Dict[str, Any], loss: Tensor) -> Tensor:
        """The loss to train on, given the bound arguments and own value of the loss module ``self.tapped``."""
        raise NotImplementedError

    def reduced(self, weight_reduce_loss: Callable, losses: Tensor, arguments: Dict[str, Any]) -> Tensor:
        """Losses ``[B, ...]`` or with a sigmoid for each class ``[B, C, ...]``, weighted and reduced as the tapped
        module's own; the function is the toolkit's."""
        weight = arguments.get('weight')
        if weight is not None and weight.dim() < losses.dim():
            weight = weight.unsqueeze(1)
        return getattr(self.tapped, 'loss_weight', 1.0) * weight_reduce_loss(
            losses,
            weight,
            arguments.get('reduction_override') or getattr(self.tapped, 'reduction', 'mean'),
            arguments.get('avg_factor'),
        )

    def state_dict(self, runner: Runner, next_iter: int) -> dict:
        """Plain tensors and numbers to save; ``next_iter`` is the iteration that a resumed run starts with.

        Runs on rank 0 only: no collective operations here.
        """
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restores ``state_dict`` after ``setup``."""

    # The life of a run.

    def before_run(self, runner: Runner) -> None:
        if trains(runner):
            self._refuse_a_twin(runner)
            _check_strategy(type(self).__name__, runner)

    def _refuse_a_twin(self, runner: Runner) -> None:
        name = type(self).__name__
        if sum(isinstance(hook, type(self)) or type(hook).__name__ == name for hook in runner.hooks) > 1:
            raise ValueError(
                f'{name}: this run has it twice (a line of custom_hooks and an option default_hooks.NAME.type, say), '
                'and the second would distil what the first has distilled: remove one of the two'
            )

    def before_train(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        self.check(runner, model)
        self.setup(runner, model)  # copies of the model are made here: deepcopy would copy torch hooks too
        if self._resumed_state is not None:
            self.load_state_dict(self._resumed_state)
            self._resumed_state = None
        _average(runner, self.averaged)
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model),
        ]
        self._set_taps(model)

    def _set_taps(self, model: nn.Module) -> None:
        for handle in self._loss_handles:
            handle.remove()
        modules, self._watched = self.loss_modules(model), self.watched(model)
        self.tapped = modules[0]
        self._loss_handles = [module.register_forward_hook(self._tap, with_kwargs=True) for module in modules]
        self._looking = True

    def before_train_iter(self, runner: Runner, batch_idx, data_batch=None) -> None:
        model = unwrap(runner.model)
        watched = self.watched(model)
        if len(watched) != len(self._watched) or any(a is not b for a, b in zip(watched, self._watched)):
            self.check(runner, model)
            self._set_taps(model)
        self._looking |= batch_idx == 0
        self._waiting, self._taps = True, set()

    def _before_model(self, model, args, kwargs) -> None:
        mode = kwargs.get('mode', args[2] if len(args) > 2 else None)
        self._computing_loss = mode == 'loss' and self._waiting and torch.is_grad_enabled()
        if self._computing_loss:
            self.before_forward(args[0] if args else kwargs['inputs'])
        elif mode == 'loss' and self._taps and model.training and torch.is_grad_enabled():
            raise RuntimeError(
                f'{type(self).__name__}: the model computed a second loss with gradients in one training iteration, '
                'and which of them to distil is not known: compute a validation loss under torch.no_grad(), or train '
                'without this hook'
            )

    def _tap(self, module, args, kwargs, output):
        if not self._computing_loss:
            return None
        if module in self._taps and not self.many_calls:
            raise RuntimeError(
                f'{type(self).__name__}: {type(module).__name__} was called more than once in a training step: this '
                'head computes several classification losses, which is not supported; train it without this hook'
            )
        self._taps.add(module)
        self.tapped = module
        arguments = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        if self._looking:
            self.check_batch(dict(arguments), output)
        return self.rewrite_loss(arguments, output)

    def _after_model(self, model, args, output):
        if not self._computing_loss:
            return None
        self._computing_loss = self._waiting = False
        if not self._taps and (self.fires_every_step or not self._forwards):
            raise RuntimeError(
                f'{type(self).__name__}: the loss module {type(self.tapped).__name__} was never called while the model '
                'computed its loss, so the loss would be the plain one. The head must call its loss_module, the one '
                'that it has at the start of an iteration; remove this hook to train without it'
            )
        self._looking = self._looking and not self._taps
        self._forwards += 1
        # Keys without the word "loss" are logged by the toolkit and not summed.
        return {**output, **self.logs}

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self._waiting or not self._forwards:
            raise RuntimeError(
                f'{type(self).__name__}: the model computed a training loss without a call model(..., mode="loss"), so '
                'it could not be tapped (has it a train_step of its own, or one compiled for an earlier run of this '
                'process?); remove this hook to train without it'
            )
        self._taps = set()

    def after_train(self, runner: Runner) -> None:
        for handle in [*self._handles, *self._loss_handles]:
            handle.remove()
        self._handles, self._loss_handles = [], []

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        state = self.state_dict(runner, checkpoint['meta']['iter'])
        if state:
            checkpoint.setdefault(CHECKPOINT_KEY, {})[type(self).__name__] = state

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume:
            self._resumed_state = checkpoint.get(CHECKPOINT_KEY, {}).get(type(self).__name__)


def only_looks(kwargs: dict) -> bool:
    """Whether a call of a loss module looks for hard samples (MMSegmentation's OHEM, MMDetection's PISA), and its value
    is not trained on."""
    return kwargs.get('reduction_override') == 'none'


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of the model is wrapped by FSDP, which leaves every rank a share of each parameter."""
    names = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return bool(names & {'FullyShardedDataParallel', 'FSDPModule'})


def is_iter_based(runner: Runner) -> bool:
    return isinstance(runner.train_loop, IterBasedTrainLoop)


def saves_after_this_iter(runner: Runner) -> bool:
    """Whether a CheckpointHook that counts iterations will save once this iteration's hooks have run."""
    return any(
        isinstance(hook, CheckpointHook)
        and not hook.by_epoch
        and (
            hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
            or (hook.save_last and hook.is_last_train_iter(runner))
        )
        for hook in runner.hooks
    )


def checkpoint_folder(runner: Runner) -> str:
    """Where the run's checkpoints go."""
    folders = [hook.out_dir for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.out_dir]
    return str((folders or [runner.work_dir])[0])


def loaded_folder(runner: Runner) -> str:
    """Where the checkpoint lies that the run was loaded or resumed from."""
    path = runner._load_from or find_latest_checkpoint(runner.work_dir) if runner._resume else None
    return os.path.dirname(path or '')


def epoch_length(runner: Runner) -> int:
    """Iterations in which all ranks together pass over the training data once, in loops of either kind.

    That is the data loader's length, but for samplers that never end and know nothing of ranks in their length
    (mmengine's InfiniteSampler, mmdet's MultiSourceSampler): on every rank it is the whole set's, and ``drop_last``
    drops nothing.
    """
    loader = runner.train_dataloader
    batches, sampler = loader.batch_sampler, getattr(loader.batch_sampler, 'sampler', None)
    if not is_iter_based(runner) or sampler is None or isinstance(sampler, DefaultSampler):
        return len(loader)
    if len(sampler) != len(loader.dataset):
        return len(loader)
    return math.ceil(len(sampler) / (get_world_size() * batches.batch_size))


def training_progress(runner: Runner, period: int) -> float:
    """Share of the training done, as PS-KD counts it; constant over an epoch (or ``period`` iterations).

    Epoch-based loops: ``(epoch + 1) / max_epochs`` (the paper). Iteration-based ones: the share of the iterations done
    when the present period began.
    """
    if is_iter_based(runner):
        return runner.iter // period * period / runner.max_iters
    return (runner.epoch + 1) / runner.max_epochs


def trains(runner: Runner) -> bool:
    """Whether the run is one of training: ``before_run`` is called for validation and tests too."""
    return isinstance(runner._train_loop, BaseLoop)


def _check_strategy(user: str, runner: Runner) -> None:
    strategy = type(getattr(runner, 'strategy', None))  # FlexibleRunner's
    if strategy is not type(None) and not {kind.__name__ for kind in strategy.__mro__} & set(STRATEGIES):
        raise ValueError(
            f'{user}: the strategy {strategy.__name__} is not supported (it was not tried): use one of '
            f'{", ".join(STRATEGIES)}'
        )


def _average(runner: Runner, names: Tuple[str, ...]) -> None:
    """mmengine's logger averages values whose name has "loss" in it: ours have not, so that they are not summed."""
    logs = runner.log_processor
    new = [name for name in names if not logs.mean_pattern.search(name)]
    logs.mean_pattern = re.compile('|'.join([logs.mean_pattern.pattern, *new]))
