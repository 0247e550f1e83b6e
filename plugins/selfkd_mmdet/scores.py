"""What a detector says about its places (points, anchors or queries), and its past copy about the same ones.

The past's term needs no labels, so that their assignment may look at predictions as it likes.
"""

import inspect
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn.functional as F
from mmdet.models.detectors import DetectionTransformer
from mmdet.utils import reduce_mean
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selfkd.losses import quality_focal_loss, soft_cross_entropy
from selfkd.past import CopyPast

__all__ = ['Places', 'check_places', 'score_loss', 'scores']

# What decides which query is which, in a decoder's call.
ASKED = ('query', 'query_pos', 'reference_points', 'self_attn_mask', 'attn_mask', 'self_attn_masks')


def check_places(hook: str, model: nn.Module) -> None:
    """Refuses what has no head that scores classes at places that student and copy share.

    Raises:
        ValueError: says what the detector has instead.
    """
    head, name = getattr(model, 'bbox_head', None), type(model).__name__
    if head is None:
        instead = next(
            (part for part in ('mask_head', 'panoptic_head', 'detector', 'head') if hasattr(model, part)), None
        )
        has = f' (it has a {instead}, {type(getattr(model, instead)).__name__})' if instead else ''
        raise ValueError(
            f'{hook}: {name} has no bbox_head or roi_head that scores boxes{has}, so there is no classification of '
            f'boxes to distil: train it without {hook}'
        )
    if _classes(head) is None:
        raise ValueError(f'{hook}: {name} with {type(head).__name__} does not say how many classes it scores')
    if isinstance(model, DetectionTransformer):
        wanted = list(inspect.signature(model.forward_transformer).parameters)
        if wanted != ['img_feats', 'batch_data_samples']:
            raise ValueError(
                f'{hook}: the transformer of {name} is asked with {", ".join(wanted)}: where it reads texts, a past '
                f'copy is not asked the same; train it without {hook}'
            )


def _classes(head: nn.Module) -> Optional[int]:
    return getattr(head, 'cls_out_channels', None) or getattr(head, 'num_classes', None)


def _is_softmax(head: nn.Module) -> bool:
    """Whether classes compete, the last of them being the background; else each has a sigmoid."""
    of_loss = getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', True)
    return not getattr(head, 'use_sigmoid_cls', of_loss)


def scores(head: nn.Module, output, queries: bool = False) -> Tensor:
    """Logits of classes at all places, ``[places, C]``, from what a head's ``forward`` gives.

    The first thing that it gives is the classes': a map ``[B, A * C, H, W]`` of each level, or ``[layers, B, Q, C]`` of
    queries. Where a score is class times objectness (YOLOX, YOLOv3), it is the logit of the product.

    Raises:
        ValueError: the first output is something else.
    """
    parts = output if isinstance(output, (tuple, list)) else [output]
    maps = list(parts[0]) if isinstance(parts[0], (tuple, list)) else [parts[0]]
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
    if hasattr(head, 'loss_obj'):
        return _logit_of_product(logits, torch.cat([_of_places(level, 1) for level in parts[2]]))
    return logits


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
        past: the same of the copy.
    """
    known = (logits.isfinite() & past.isfinite()).all(1)  # heads that rule out places
    logits, past = logits[known], past[known].float()
    if _is_softmax(head):
        probs = past.softmax(1)
        losses, objects = soft_cross_entropy(logits, probs, reduction='sum'), probs[:, :-1].amax(1).sum()
    else:
        probs = past.sigmoid()
        losses, objects = quality_focal_loss(logits, probs, reduction='sum'), probs.amax(1).sum()
    return losses / reduce_mean(objects).clamp(min=1)


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
        return scores(self.past.model.bbox_head, self.past.run(self._forward, inputs, data_samples), self.queries)

    def _forward(self, inputs: Tensor, data_samples: list):
        model = self.past.model
        feats = model.extract_feat(inputs)
        if not self.queries:
            return model.bbox_head(feats)
        if 'query' not in self._asked:
            raise RuntimeError(
                f'PSKDHook: {type(model).__name__} does not call its decoder with query=, so the past copy cannot be '
                "asked the student's queries; train it without PSKDHook"
            )
        found = model.forward_transformer(feats, data_samples)
        self._asked = {}  # not to be held through the backward pass
        wanted = inspect.signature(model.bbox_head.forward).parameters
        return model.bbox_head(**{name: value for name, value in found.items() if name in wanted})
