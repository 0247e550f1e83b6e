"""What a detector says about its places (points, anchors or queries), and its past copy about the same ones.

The past's term needs no labels, so that their assignment may look at predictions as it likes.
"""

import inspect
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import AutoAssignHead, CenterNetHead, CornerHead, DecoupledSOLOHead, SOLOHead
from mmdet.models.detectors import DetectionTransformer, SemiBaseDetector
from mmdet.utils import reduce_mean
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selfkd.losses import quality_focal_loss, soft_cross_entropy
from selfkd.past import CopyPast

__all__ = ['Places', 'check_places', 'check_scores', 'score_loss', 'scores', 'scoring_head']

# What decides which query is which, in a decoder's call.
ASKED = ('query', 'query_pos', 'reference_points', 'self_attn_mask', 'attn_mask', 'self_attn_masks')

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def scoring_head(model: nn.Module) -> Any:
    """The head that scores classes at places: a ``bbox_head``, or SOLO's mask head; else None."""
    masks = getattr(model, 'mask_head', None)
    return getattr(model, 'bbox_head', None) or (masks if isinstance(masks, SOLOHead) else None)


def check_places(hook: str, model: nn.Module) -> None:
    """Refuses what has no head that scores classes at places that student and copy share.

    Raises:
        ValueError: says what the detector has instead.
    """
    head, name = scoring_head(model), type(model).__name__
    if head is None:
        raise ValueError(f'{hook}: {name} {_instead(model)}')
    if _classes(head) is None:
        raise ValueError(f'{hook}: {name} with {type(head).__name__} does not say how many classes it scores')
    transformer = isinstance(model, DetectionTransformer)
    asked = model.forward_transformer if transformer else head.forward
    known = ['img_feats', 'batch_data_samples'] if transformer else []
    given = [part for part in inspect.signature(asked).parameters.values() if part.kind not in VARIADIC]
    others = [part.name for part in given[not transformer :] if part.name not in known and part.default is part.empty]
    if others:
        raise ValueError(
            f'{hook}: {name} scores boxes by {", ".join(others)} as well as by images: where it reads texts, a past '
            f'copy is not asked the same; train it without {hook}'
        )


def _instead(model: nn.Module) -> str:
    """The end of the sentence that begins with the name of a model that scores no boxes."""
    parts = {name: type(part).__name__ for name, part in model.named_children()}
    way_out = 'train it without PSKDHook'
    if 'detector' in parts:
        return (
            f'is a tracker around a detector ({parts["detector"]}): train the detector with PSKDHook, from its own '
            f'config, and load its weights here; or {way_out}'
        )
    if isinstance(model, SemiBaseDetector):
        return (
            'has a teacher already, a moving average of the student, whose labels it trains on: train its detector '
            f'with PSKDHook, from its own config, or {way_out}'
        )
    queries = next((name for name in ('panoptic_head', 'track_head') if name in parts), None)
    if queries:
        return (
            f'classifies the masks that its queries draw ({queries}, {parts[queries]}). The past may draw another mask '
            f'for a query, so there is no place that both classify: {way_out}'
        )
    head = next((name for name in parts if 'head' in name), None)
    has = f' (it has a {head}, {parts[head]})' if head else ''
    return f'has no bbox_head or roi_head{has}, where PS-KD looks for the classification of boxes: {way_out}'


def _classes(head: nn.Module) -> Optional[int]:
    return getattr(head, 'cls_out_channels', None) or getattr(head, 'num_classes', None)


def _is_softmax(head: nn.Module) -> bool:
    """Whether classes compete, the last of them being the background; else each has a sigmoid."""
    of_loss = getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', True)
    return not getattr(head, 'use_sigmoid_cls', of_loss)


def scores(head: nn.Module, output, queries: bool = False) -> Tensor:
    """Logits of classes at all places, ``[places, C]``, from what a head's ``forward`` gives.

    The first thing that it gives is the classes': a map ``[B, A * C, H, W]`` of each level, or ``[layers, B, Q, C]`` of
    queries. Heads that give probabilities (CenterNet, TOOD) have their logits taken. Where a score is class times
    objectness (YOLOX, YOLOv3, AutoAssign), it is the logit of the product.

    Raises:
        ValueError: the first output is something else.
    """
    parts = output if isinstance(output, (tuple, list)) else [output]
    maps = _class_maps(head, parts)
    classes, attributes = _classes(head), getattr(head, 'num_attrib', None)
    assert classes is not None  # check_places has refused other heads
    if attributes:  # YOLOv3's boxes, objectness and classes are one map
        whole = torch.cat([_of_places(level, attributes) for level in maps])
        return _logit_of_product(whole[:, 5:], whole[:, 4:5])
    channel = -1 if queries else 1
    if not all(
        isinstance(level, Tensor) and level.dim() == 4 and level.shape[channel] % classes == 0 for level in maps
    ):
        found = [tuple(level.shape) if isinstance(level, Tensor) else type(level).__name__ for level in maps]
        raise ValueError(
            f'PSKDHook: the first output of {type(head).__name__} is {found}, no scores of {classes} classes, '
            'so that it is not known what to distil: train it without PSKDHook'
        )
    if queries:
        return torch.cat([level.flatten(0, -2) for level in maps])
    logits = torch.cat([_of_places(level, classes) for level in maps])
    if gives_probs(head):
        return logits.float().logit(eps=1e-6)
    objectness = _objectness(head, parts, [(len(m), m.shape[1] // classes, *m.shape[2:]) for m in maps])
    if objectness is not None:
        return _logit_of_product(logits, torch.cat([_of_places(level, 1) for level in objectness]))
    return logits


def _objectness(head: nn.Module, parts, shapes: List[tuple]) -> Optional[list]:
    """The third output, if it is trained and has a value for each place. A head may have its loss from a base class,
    and no such output."""
    trained = hasattr(head, 'loss_obj') or isinstance(head, AutoAssignHead)
    third = parts[2] if trained and len(parts) > 2 and isinstance(parts[2], (tuple, list)) else ()
    return list(third) if [getattr(level, 'shape', None) for level in third] == shapes else None


def _class_maps(head: nn.Module, parts) -> list:
    """What a head says of classes, for each level, among the parts of its output."""
    if isinstance(head, SOLOHead):  # masks come first
        return list(parts[2 if isinstance(head, DecoupledSOLOHead) else 1])
    if isinstance(head, CornerHead):  # both kinds of corners have a class
        return [*parts[0], *parts[1]]
    return list(parts[0]) if isinstance(parts[0], (tuple, list)) else [parts[0]]


def gives_probs(head: nn.Module) -> bool:
    """Whether a head gives probabilities instead of logits."""
    return isinstance(head, CenterNetHead) or getattr(getattr(head, 'loss_cls', None), 'activated', False)


def check_scores(hook: str, head: nn.Module, logits: Tensor) -> None:
    """Refuses a batch's scores that look like probabilities, of a head that is not known to give them.

    Raises:
        ValueError: names the head.
    """
    least, most = float(logits.min()), float(logits.max())
    if len(logits) > 1 and 0 <= least < most <= 1:
        raise ValueError(
            f'{hook}: what {type(head).__name__} gives for classes lies between {least:.3g} and {most:.3g}, so it '
            'seems to be probabilities, and logits are needed: have its forward give logits (or its loss_cls say '
            f'activated=True), or train it without {hook}'
        )


def _of_places(level: Tensor, channels: int) -> Tensor:
    """A map ``[B, A * channels, H, W]`` as ``[places, channels]``."""
    return level.permute(0, 2, 3, 1).reshape(-1, channels)


def _logit_of_product(one: Tensor, other: Tensor) -> Tensor:
    """The logit of ``sigmoid(one) * sigmoid(other)``, in float32."""
    log = F.logsigmoid(one.float()) + F.logsigmoid(other.float())
    log = log.clamp(max=-1e-6)  # a product of 1 has no logit
    return log - torch.log(-torch.expm1(log))


def score_loss(head: nn.Module, logits: Tensor, past: Tensor) -> Tensor:
    """The past's term: the quality focal loss against its scores (softmax heads: the cross-entropy), summed over all
    places, and divided by the number of objects that it expects, the sum of each place's highest probability.

    Args:
        logits: ``[places, C]``, the student's.
        past: the same of the copy; overwritten, since it can be gigabytes where classes are many.

    Raises:
        RuntimeError: they are not of the same places.
    """
    if logits.shape != past.shape:
        raise RuntimeError(
            f'PSKDHook: {type(head).__name__} scores {tuple(logits.shape)} of the student, but {tuple(past.shape)} of '
            'the past copy, so that they are not of the same places; train it without PSKDHook'
        )
    known = _finite(logits.detach()) & _finite(past)  # heads rule out places
    if not known.all():
        logits, past = logits[known], past[known]
    if _is_softmax(head):
        probs = past.float().softmax(1)
        losses, objects = soft_cross_entropy(logits, probs, reduction='sum'), probs[:, :-1].amax(1).sum()
    else:
        probs = past.float().sigmoid_()
        losses, objects = quality_focal_loss(logits, probs, reduction='sum'), probs.amax(1).sum()
    return losses / reduce_mean(objects).clamp(min=1)


def _finite(rows: Tensor) -> Tensor:
    """Which rows are finite, without a tensor of their size."""
    return rows.amin(1).isfinite() & rows.amax(1).isfinite()


class Places:
    """Asks the copy about the places of the student.

    A dense head's places are fixed by the image. A transformer's are queries, which follow from what it has seen: the
    copy's decoder is asked the student's, over its own memory.
    """

    def __init__(self, model: nn.Module, past: CopyPast):
        self.past = past
        self.queries = isinstance(model, DetectionTransformer)
        self._asked: Dict[str, Any] = {}

    def attach(self, model: nn.Module, listens: Callable[[], bool]) -> List[RemovableHandle]:
        """Hooks that note the queries of the student while ``listens()``."""
        if not self.queries:
            return []

        def note(decoder, args, kwargs):
            if listens():
                self._asked = {name: value for name, value in kwargs.items() if name in ASKED}

        def ask(decoder, args, kwargs):
            return args, {**kwargs, **self._asked}

        decoders = ((model.decoder, note), (self.past.model.decoder, ask))
        return [decoder.register_forward_pre_hook(hook, with_kwargs=True) for decoder, hook in decoders]

    def scores(self, inputs: Tensor, data_samples: list) -> Tensor:
        """The copy's logits ``[places, C]``."""
        return scores(scoring_head(self.past.model), self.past.run(self._forward, inputs, data_samples), self.queries)

    def _forward(self, inputs: Tensor, data_samples: list):
        model = self.past.model
        head = scoring_head(model)
        # Also where the layers below are in evaluation mode: heads and decoders then give what they do for inference.
        for part in (model, model.decoder, head) if self.queries else (head,):
            part.training = True
        feats = model.extract_feat(inputs)
        if not self.queries:
            return head(feats)
        if 'query' not in self._asked:
            raise RuntimeError(
                f'PSKDHook: {type(model).__name__} does not call its decoder with query=, so the past copy cannot be '
                "asked the student's queries; train it without PSKDHook"
            )
        found = model.forward_transformer(feats, data_samples)
        self._asked = {}  # not to be held through the backward pass
        parts = inspect.signature(head.forward).parameters
        # A subclass's forward(*args, **kwargs) hands on to its base class's, which names these two.
        wanted = {'hidden_states', 'references'} if any(p.kind in VARIADIC for p in parts.values()) else set()
        return head(**{name: value for name, value in found.items() if name in wanted.union(parts)})
