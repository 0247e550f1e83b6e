"""What remains of a training checkpoint for inference."""

from typing import Dict

import torch
from mmengine.runner.checkpoint import weights_to_cpu

TRAINING_ONLY = ('self_teacher', 'auxiliary')  # sub-modules of our heads

__all__ = ['publish_checkpoint', 'strip_self_teacher']


def strip_self_teacher(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The weights that inference uses: without every sub-module named as in ``TRAINING_ONLY``, at any depth."""
    return {name: value for name, value in state_dict.items() if not set(TRAINING_ONLY) & set(name.split('.'))}


def publish_checkpoint(source: str, target: str) -> int:
    """Writes a checkpoint with the weights for inference only; returns the number of weights that were dropped.

    Args:
        source: a checkpoint of mmengine's runner. Load only files you trust: it is unpickled.
        target: the file to write; it loads with ``torch.load(..., weights_only=True)``, and strictly into the vanilla
            config.
    """
    checkpoint = torch.load(source, map_location='cpu')
    state = weights_to_cpu(checkpoint.get('state_dict', checkpoint))
    kept = strip_self_teacher(state)
    torch.save({'state_dict': kept}, target)
    return len(state) - len(kept)
