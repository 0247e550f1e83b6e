"""What a two-stage detector says about its regions, and its past copy about the same ones."""

import inspect
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from mmdet.models.losses import CrossEntropyCustomLoss, CrossEntropyLoss, FocalLoss, SeesawLoss
from mmdet.models.roi_heads import CascadeRoIHead
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selfkd.losses import quality_focal_loss, soft_cross_entropy
from selfkd.past import CopyPast
from selfkd_mmengine.pskd_hook import is_sigmoid

from .heads import check_roi_head, per_stage, region_heads

__all__ = ['Regions', 'check_past_of_regions', 'hard_background', 'logits_of', 'past_losses']

OF_IMAGE = ('semantic', 'glbctx')  # a RoI head's heads for the whole image
# What the classification of regions is a function of. The last two are Sparse R-CNN's.
REGIONS = ('self', 'stage', 'x', 'rois', *(f'{name}_feat' for name in OF_IMAGE), 'object_feats', 'batch_img_metas')


def check_past_of_regions(hook: str, model: nn.Module) -> None:
    """Refuses what does not classify the regions that it is given: a past copy is asked about the student's.

    Raises:
        ValueError: names what the RoI head also needs, or its loss.
    """
    roi_head = model.roi_head
    name = type(roi_head).__name__
    check_roi_head(hook, model)
    others = [part for part in inspect.signature(roi_head._bbox_forward).parameters if part not in REGIONS]
    if others:
        raise ValueError(
            f'{hook}: {name} classifies regions by {", ".join(others)} as well, which a past copy has of its own, so '
            f'that it cannot be asked about the same regions; train it without {hook}'
        )
    for head in region_heads(model):
        loss = head.loss_cls
        if not _is_known(loss):
            raise ValueError(
                f'{hook}: {type(head).__name__} classifies regions with {type(loss).__name__}, and the past of a '
                'softmax (CrossEntropyLoss, SeesawLoss) or of sigmoids (FocalLoss, CrossEntropyLoss without '
                f'class_weight) is needed: set another loss_cls, or train it without {hook}'
            )


def _is_known(loss: Any) -> bool:
    if isinstance(loss, (FocalLoss, SeesawLoss)):
        return not getattr(loss, 'activated', False)
    plain = type(loss) in (CrossEntropyLoss, CrossEntropyCustomLoss) and not loss.use_mask
    return plain and not (loss.use_sigmoid and loss.class_weight is not None)


def logits_of(loss: nn.Module, cls_score: Tensor) -> Tensor:
    """Logits ``[N, C]`` of the classes that a loss module trains.

    The Seesaw loss has two softmaxes, of the classes and of whether there is an object: the logits of their product.
    """
    if not isinstance(loss, SeesawLoss):
        return cls_score
    classes, objectness = (part.float().log_softmax(1) for part in (cls_score[:, :-2], cls_score[:, -2:]))
    return torch.cat([classes + objectness[:, :1], objectness[:, 1:]], 1)


def hard_background(probs: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Past probs ``[N, C]``, with the label in their place where that is the background."""
    background = label == num_classes
    of_label = F.one_hot(label, max(num_classes + 1, probs.shape[1]))[:, : probs.shape[1]]
    return torch.where(background[:, None], of_label.to(probs), probs)


def past_losses(loss: Any, logits: Tensor, probs: Tensor) -> Tensor:
    """The past's term of each region, ``[N]``: least where student and past agree."""
    if is_sigmoid(loss):
        gamma = 2.0 if isinstance(loss, FocalLoss) else 0.0
        return quality_focal_loss(logits, probs, gamma=gamma, reduction='none').sum(1)
    weight = getattr(loss, 'class_weight', None)
    return soft_cross_entropy(logits, probs, class_weight=weight, reduction='none')


class Regions:
    """Asks the copy about the regions of the student.

    The copy classifies them when the student is about to read them, and not at the loss, which mmdet leaves out of a
    batch without regions; and always all of them: batch norms in the copy's box head see what the student's see, and
    wait for no rank that has none.

    Sparse R-CNN's regions come with features, as queries do. The copy is asked the student's at the first stage; what
    becomes of them is its own.
    """

    def __init__(self, model: nn.Module, past: CopyPast):
        self.model, self.past = model, past
        self.wanted = inspect.signature(model.roi_head._bbox_forward).parameters
        self.begin(None, None)

    def begin(self, inputs: Optional[Tensor], data_samples: Any) -> None:
        """Before a forward pass of the student. ``inputs``: None if there is no past to ask."""
        # The regions that each stage has read last, and those that the copy has classified, with its scores.
        self._read: Dict[int, Tensor] = {}
        self._classified: Dict[int, Tuple[Tensor, Tensor]] = {}
        self._given: Optional[Dict[str, Any]] = None  # what the copy classifies by, besides regions
        if inputs is None:
            return
        feats = self.past.run(self.past.model.extract_feat, inputs)
        self._given = {'x': feats, **self.past.run(self._of_image, feats)}
        if 'batch_img_metas' in self.wanted:
            self._given['batch_img_metas'] = [sample.metainfo for sample in data_samples]

    def _of_image(self, feats: Tuple[Tensor, ...]) -> Dict[str, Tensor]:
        """What the RoI head makes of the whole image before it classifies regions (HTC, SCNet)."""
        roi_head = self.past.model.roi_head
        makers = {f'{name}_feat': getattr(roi_head, f'{name}_head', None) for name in OF_IMAGE}
        return {name: maker(feats)[1] for name, maker in makers.items() if name in self.wanted and maker is not None}

    def attach(self, listens: Callable[[], bool]) -> List[RemovableHandle]:
        """Hooks on the student that ask the copy while ``listens()``."""
        roi_head, handles = self.model.roi_head, []
        sparse = 'object_feats' in self.wanted
        for stage, extractor in enumerate(per_stage(roi_head.bbox_roi_extractor)):
            handles.append(extractor.register_forward_pre_hook(partial(self._reads, listens, stage, not sparse)))
        for stage, head in enumerate(region_heads(self.model) if sparse else []):
            handles.append(head.register_forward_pre_hook(partial(self._reads_feats, listens, stage)))
        return handles

    def _reads(self, listens: Callable[[], bool], stage: int, asks: bool, extractor: nn.Module, args) -> None:
        if not listens() or not torch.is_grad_enabled():  # a sampler looks for hard regions (PISA)
            return
        self._read[stage] = args[1]
        if asks:
            self._classify(stage)

    def _reads_feats(self, listens: Callable[[], bool], stage: int, head: nn.Module, args) -> None:
        if listens() and self._given is not None:
            self._given.setdefault('object_feats', args[1].detach())
            self._classify(stage)

    def _classify(self, stage: int) -> None:
        if self._given is None or stage in self._classified:
            return
        roi_head, rois = self.past.model.roi_head, self._read[stage]
        of_stage = {'stage': stage} if isinstance(roi_head, CascadeRoIHead) else {}
        found = self.past.run(roi_head._bbox_forward, rois=rois, **of_stage, **self._given)
        self._classified[stage] = rois, found['cls_score'].flatten(0, -2)
        if 'object_feats' in self.wanted:
            self._given['object_feats'] = found['object_feats']
        if len(self._classified) == len(region_heads(self.model)):
            self._given = None  # not to be held through the backward pass

    def take(self, stage: int, cls_score: Tensor) -> Tensor:
        """The copy's ``cls_score`` for the regions of which the student's is given.

        Raises:
            RuntimeError: the copy has classified others, or none.
        """
        if stage not in self._classified:
            raise RuntimeError(
                f'PSKDHook: {type(self.model.roi_head).__name__} is trained on scores of regions that its '
                'bbox_roi_extractor has not read, so a past copy was not asked about them; train it without PSKDHook'
            )
        read, (classified, past) = self._read.pop(stage), self._classified.pop(stage)
        if past.shape != cls_score.shape or not (read is classified or torch.equal(read, classified)):
            raise RuntimeError(
                f'PSKDHook: {type(self.model.roi_head).__name__} is trained on scores {tuple(cls_score.shape)} of its '
                f'regions, and gives {tuple(past.shape)} for those that it reads first; train it without PSKDHook'
            )
        return past
