"""What remains of a training checkpoint for inference."""

from typing import Dict

import torch
from torch import Tensor

from .teacher import SELF_TEACHER

__all__ = ['publish_checkpoint', 'strip_self_teacher']

TRAINING_ONLY = (SELF_TEACHER, 'auxiliary')  # sub-modules of our heads
WEIGHTS = ('state_dict', 'model')  # where mmengine and Detectron2 keep them


def strip_self_teacher(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The weights that inference uses: without every sub-module named as in ``TRAINING_ONLY``, at any depth.

    Example:
        >>> sorted(strip_self_teacher({'head.fc.bias': torch.zeros(1), 'head.self_teacher.fc.bias': torch.zeros(1)}))
        ['head.fc.bias']
    """
    return {name: value for name, value in state_dict.items() if not set(TRAINING_ONLY) & set(name.split('.'))}


def publish_checkpoint(source: str, target: str) -> int:
    """Writes a checkpoint with the weights for inference only; returns the number of weights that were dropped.

    Args:
        source: a checkpoint of mmengine's runner or of Detectron2's trainer, or a state dict. Load only files you
            trust: it is unpickled.
        target: the file to write, under the same key; it loads with ``torch.load(..., weights_only=True)``, and
            strictly into the vanilla config.
    """
    checkpoint = torch.load(source, map_location='cpu')
    key = next((key for key in WEIGHTS if isinstance(checkpoint.get(key), dict)), None)
    state = checkpoint if key is None else checkpoint[key]
    kept = strip_self_teacher(state)
    torch.save({key or 'state_dict': kept}, target)
    return len(state) - len(kept)
