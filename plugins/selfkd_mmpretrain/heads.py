"""What the methods ask of a classifier's head: one prediction, a softmax over classes, that its loss module sees."""

from typing import Any, Dict, List, Optional, Tuple

import torch
from mmengine.runner import Runner
from mmpretrain.models.heads import ArcFaceClsHead, ClsHead, ConformerHead, MultiLabelClsHead
from mmpretrain.models.losses import CrossEntropyLoss, LabelSmoothLoss
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from selfkd_mmengine import SelfKDHook

from .replay import Replay

__all__ = ['ClassifierHook', 'check_head', 'check_head_type', 'has_plain_loss', 'logits_and_target', 'logits_of']
__all__ += ['target_of']


def check_head(user: str, model: nn.Module, *, own_losses: bool = False) -> None:
    """Refuses a model without a head that trains one softmax over classes.

    Args:
        user: whose demand it is, for the message.
        model: unwrapped.
        own_losses: let losses pass that are none of MMPretrain's: the user compares their values.

    Raises:
        ValueError: there is no head with a ``loss_module``, or one of several classifiers (Conformer), with a margin
            (ArcFace), or with a multi-label or sigmoid loss.
    """
    head = getattr(model, 'head', None)
    loss = getattr(head, 'loss_module', None)
    name = type(head).__name__
    if not isinstance(loss, nn.Module):
        raise ValueError(
            f'{user}: {type(model).__name__} with the head {name} has no classification head with a loss_module: '
            'use an ImageClassifier with a LinearClsHead or the like'
        )
    check_head_type(user, head)
    if isinstance(head, ArcFaceClsHead):
        raise ValueError(
            f'{user}: {name} trains on logits with a margin, which are not its predictions: what it would teach points '
            'away from the label. Use a LinearClsHead, or train without this method'
        )
    if isinstance(head, ConformerHead):
        raise ValueError(
            f'{user}: {name} has two classifiers with a loss each, and one prediction is needed: use a network with '
            'one classifier, or train without this method'
        )
    if isinstance(head, MultiLabelClsHead) or not _is_softmax_loss(loss, own_losses):
        raise ValueError(
            f'{user}: {name} trains with {type(loss).__name__}, but a prediction is a softmax over classes here: '
            'multi-label and sigmoid losses are not supported. Use CrossEntropyLoss (use_sigmoid=False) or '
            'LabelSmoothLoss (mode original or classy_vision) in model.head.loss'
        )


def check_head_type(user: str, head) -> None:
    """Refuses the config of a head that is none of a classifier (but of self-supervision, say) before it is built."""
    kind = head.get('type') if isinstance(head, dict) else type(head)
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    if isinstance(kind, type) and head is not None and not issubclass(kind, (ClsHead, MultiLabelClsHead)):
        raise ValueError(
            f'{user}: {kind.__name__} is not a classification head: use an ImageClassifier with a LinearClsHead or the '
            'like'
        )


def _is_softmax_loss(loss: nn.Module, own_losses: bool) -> bool:
    if isinstance(loss, LabelSmoothLoss):
        return loss.mode != 'multi_label' and not loss.ce.use_sigmoid
    if isinstance(loss, CrossEntropyLoss):
        return not loss.use_sigmoid
    return own_losses and not type(loss).__module__.startswith('mmpretrain.')


def has_plain_loss(head: nn.Module) -> bool:
    """Whether the head computes its loss as ``ClsHead`` does: its loss module, once, on its prediction."""
    same = (getattr(type(head), name, None) is getattr(ClsHead, name) for name in ('loss', '_get_loss'))
    return all(same)


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits ``[B, C]`` of preprocessed inputs, in the model's present mode; of a retriever too."""
    return model.head(model.extract_feat(inputs))


def target_of(data_samples: List[DataSample]) -> Tensor:
    """What MMPretrain's heads train on: class ids ``[B]``, or after batch augmentation scores ``[B, C]``."""
    if 'gt_score' in data_samples[0]:
        return torch.stack([sample.gt_score for sample in data_samples])
    return torch.cat([sample.gt_label for sample in data_samples])


def logits_and_target(arguments: Dict[str, Any]) -> Tuple[Tensor, Tensor]:
    """What a loss module was called with first; own ones may name it otherwise than MMPretrain does."""
    logits, target = list(arguments.values())[:2]
    return logits, target


class ClassifierHook(SelfKDHook):
    """The base of hooks for classifiers: taps ``head.loss_module``, whose logits must be the model's prediction.

    Both are compared on the batches of :meth:`check_batch`, for which the model runs once more.
    """

    own_losses = False  # whether the subclass compares the value of losses that are none of MMPretrain's
    _replay: Optional[Replay] = None

    def loss_module(self, model: nn.Module) -> nn.Module:
        return model.head.loss_module

    def check(self, runner: Runner, model: nn.Module) -> None:
        check_head(type(self).__name__, model, own_losses=self.own_losses)
        super().check(runner, model)

    def _before_model(self, model, args, kwargs) -> None:
        super()._before_model(model, args, kwargs)
        if self._computing_loss and self._looking:
            self._replay = Replay(model, args[0] if args else kwargs['inputs'])

    def check_batch(self, arguments: Dict[str, Any], loss: Tensor) -> None:
        super().check_batch(arguments, loss)
        self._trained_on = logits_and_target(arguments)[0].detach().clone()

    def _after_model(self, model, args, output):
        output = super()._after_model(model, args, output)
        if self._replay is not None:
            replay, self._replay = self._replay, None
            self._compare(replay(logits_of).float(), self._trained_on.float())
        return output

    def _compare(self, predicted: Tensor, trained_on: Tensor) -> None:
        if predicted.shape == trained_on.shape:
            difference, size = (predicted - trained_on).abs().max(), predicted.abs().max()
            if not bool(difference > 0.02 * size):  # NaN is nobody's fault here
                return
        raise RuntimeError(
            f'{type(self).__name__}: {type(self.tapped).__name__} is trained on other logits than those that the head '
            'predicts (with a margin, a temperature, one of several?), so predictions cannot be taught; train this '
            'head without this hook'
        )
