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
from selfkd_mmengine.pskd_hook import is_sigmoid

from .replay import rehearse

__all__ = ['ClassifierHook', 'check_head', 'check_head_type', 'has_plain_loss', 'head_of', 'logits_and_target']
__all__ += ['logits_of', 'mixes_samples', 'target_of']

WAY_OUT = 'use an ImageClassifier with a LinearClsHead or the like, or train without this method'


def head_of(model: nn.Module) -> Any:
    """What has the ``loss_module``: the head, or a model that classifies itself (``TimmClassifier``)."""
    return getattr(model, 'head', model)


def check_head(
    user: str, model: nn.Module, *, own_losses: bool = False, sigmoid: bool = False, several: bool = False
) -> None:
    """Refuses a model without a head that trains one softmax over classes.

    Args:
        user: whose demand it is, for the message.
        model: unwrapped.
        own_losses: let losses pass that are none of MMPretrain's: the user compares their values.
        sigmoid: let cross-entropies with a sigmoid for each class pass (multi-label heads).
        several: let heads of several classifiers pass, with a loss each (Conformer).

    Raises:
        ValueError: there is no head with a ``loss_module``, or one with a margin (ArcFace), or of what is not let pass.
    """
    head = head_of(model)
    loss = getattr(head, 'loss_module', None)
    name = type(head).__name__
    if not isinstance(loss, nn.Module):
        owner = '' if head is model else f' with the head {name}'
        raise ValueError(
            f'{user}: {type(model).__name__}{owner} has no loss_module of a classification, so there is no class '
            f'prediction to distil: {WAY_OUT}'
        )
    if head is not model:
        check_head_type(user, head)
    if isinstance(head, ArcFaceClsHead):
        raise ValueError(
            f'{user}: {name} trains on logits with a margin, which are not its predictions: what it would teach points '
            'away from the label. Use a LinearClsHead, or train without this method'
        )
    if isinstance(head, ConformerHead) and not several:
        raise ValueError(
            f'{user}: {name} has two classifiers with a loss each, and one prediction is needed: use a network with '
            'one classifier, or train without this method'
        )
    _check_loss(user, head, loss, own_losses, sigmoid)


def _check_loss(user: str, head: nn.Module, loss: nn.Module, own_losses: bool, sigmoid: bool) -> None:
    name = type(head).__name__
    if isinstance(head, MultiLabelClsHead) and not is_sigmoid(loss):
        raise ValueError(
            f'{user}: {name} predicts a sigmoid for each class and trains with {type(loss).__name__}, which is no '
            'cross-entropy of them: use CrossEntropyLoss(use_sigmoid=True) in model.head.loss'
        )
    if is_sigmoid(loss) and not sigmoid:
        raise ValueError(
            f'{user}: {name} trains with {type(loss).__name__}, a sigmoid for each class, but a prediction is one '
            'softmax over classes here: use CrossEntropyLoss (use_sigmoid=False) or LabelSmoothLoss (mode original or '
            'classy_vision) in model.head.loss, or PSKDHook, which has multi-label losses'
        )
    if not (isinstance(loss, (CrossEntropyLoss, LabelSmoothLoss)) or own_losses and not _is_toolkits(loss)):
        raise ValueError(
            f'{user}: {name} trains with {type(loss).__name__}, which is not the cross-entropy of its prediction: use '
            'CrossEntropyLoss or LabelSmoothLoss in model.head.loss'
        )
    if sigmoid and getattr(getattr(loss, 'ce', loss), 'pos_weight', None) is not None and is_sigmoid(loss):
        raise ValueError(
            f'{user}: pos_weight of {type(loss).__name__} raises predictions above what is taught, and a past '
            'prediction would be raised again in each epoch: remove pos_weight from model.head.loss'
        )


def check_head_type(user: str, head) -> None:
    """Refuses the config of a head that is none of a classifier (but of self-supervision, say) before it is built."""
    kind = head.get('type') if isinstance(head, dict) else type(head)
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    if isinstance(kind, type) and head is not None and not issubclass(kind, (ClsHead, MultiLabelClsHead)):
        raise ValueError(
            f'{user}: {kind.__name__} does not classify images, so there is no class prediction to distil: {WAY_OUT}'
        )


def _is_toolkits(loss: nn.Module) -> bool:
    return type(loss).__module__.startswith('mmpretrain.')


def mixes_samples(model: Any) -> bool:
    """Whether batches are augmented as a whole (Mixup, CutMix, ...)."""
    return getattr(model.data_preprocessor, 'batch_augments', None) is not None


def has_plain_loss(head: nn.Module) -> bool:
    """Whether the head computes its loss as ``ClsHead`` does: its loss module, once, on its prediction."""
    same = (getattr(type(head), name, None) is getattr(ClsHead, name) for name in ('loss', '_get_loss'))
    return all(same)


def logits_of(model: Any, inputs: Tensor) -> List[Tensor]:
    """Logits ``[B, C]`` of preprocessed inputs, in the model's present mode: of each classifier, in most models one."""
    if head_of(model) is not model:
        logits = model.head(model.extract_feat(inputs))  # of a retriever, too
    else:  # not by a call, which hooks would take for a step of training
        logits = model.forward(inputs, mode='tensor')
    return list(logits) if isinstance(logits, (tuple, list)) else [logits]


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
    """The base of hooks for classifiers: taps the head's ``loss_module``, whose logits must be the model's prediction.

    Both are compared on the batches of ``check_batch``, for which the model runs once more. A head of several
    classifiers (Conformer) gives several predictions, and calls its loss module for each: ``rewrite_loss`` is
    called with each, and ``place`` says which of the predictions it is. Calls with other logits (of auxiliary
    classifiers, which predict nothing) are left alone.
    """

    many_calls = True
    own_losses = False  # whether the subclass compares the value of losses that are none of MMPretrain's
    sigmoid = False  # whether it distils sigmoids
    several = False  # whether it distils several predictions of a sample
    place: Optional[int]

    def loss_module(self, model: nn.Module) -> nn.Module:
        return head_of(model).loss_module

    def check(self, runner: Runner, model: nn.Module) -> None:
        options = dict(own_losses=self.own_losses, sigmoid=self.sigmoid, several=self.several)
        check_head(type(self).__name__, model, **options)
        super().check(runner, model)

    def _before_model(self, model, args, kwargs) -> None:
        super()._before_model(model, args, kwargs)
        if not self._computing_loss:
            return
        self._calls = 0
        if self._looking:
            predictions = rehearse(logits_of, model, args[0] if args else kwargs['inputs'])
            self._predictions = [predicted.float() for predicted in predictions]
            # Of each call of the loss module in a step, which prediction it is of.
            self._places: List[Optional[int]] = []
            if len(self._predictions) > 1 and not self.several:
                raise RuntimeError(
                    f'{type(self).__name__}: {type(head_of(model)).__name__} gives {len(self._predictions)} '
                    'predictions of a sample, and one is needed: use a network with one classifier, or train without '
                    'this hook'
                )

    def _tap(self, module, args, kwargs, output):
        if not self._computing_loss:
            return None
        if self._looking:
            self._places.append(self._place_of([*args, *kwargs.values()][0].detach().float()))
        elif self._calls == len(self._places):
            self._refuse_other_calls()
        self.place = self._places[self._calls]
        self._calls += 1
        return None if self.place is None else super()._tap(module, args, kwargs, output)

    def _place_of(self, logits: Tensor) -> Optional[int]:
        """Which of the model's predictions these logits are, or None."""
        distances = {}
        for i, predicted in enumerate(self._predictions):
            if predicted.shape == logits.shape:
                largest = predicted.abs().max().clamp(min=torch.finfo(predicted.dtype).tiny)
                distance = float((predicted - logits).abs().max() / largest)
                if not distance > 0.02:  # NaN is nobody's fault here
                    distances[i] = distance
        new = [i for i in sorted(distances, key=distances.__getitem__) if i not in self._places]
        if distances and not new:
            raise RuntimeError(
                f'{type(self).__name__}: {type(self.tapped).__name__} was called more than once in a training step '
                'with the same prediction: this head computes several classification losses of it, which is not '
                'supported; train it without this hook'
            )
        return new[0] if new else None

    def _after_model(self, model, args, output):
        if self._computing_loss and self._calls:
            if self._calls != len(self._places):
                self._refuse_other_calls()
            if len(set(self._places) - {None}) < len(self._predictions):
                raise RuntimeError(
                    f'{type(self).__name__}: {type(self.tapped).__name__} is trained on other logits than those that '
                    'the head predicts (with a margin, a temperature, a sum of several?), so predictions cannot be '
                    'taught; train this head without this hook'
                )
        return super()._after_model(model, args, output)

    def _refuse_other_calls(self) -> None:
        raise RuntimeError(
            f'{type(self).__name__}: {type(self.tapped).__name__} is called {len(self._places)} times in a training '
            'step of this epoch, and in another more or less often: which call is of which prediction is not known; '
            'train this head without this hook'
        )
