"""Each method's options, in their order, with their default for each task; docs/evidence.md says why.

A plugin has the options that make sense in it. A test compares every constructor, config node, flag and dataclass with
this file, so that what is not an option of a plugin is a decision (``absent`` in that test), not an oversight.
"""

from typing import Any, Dict

__all__ = ['CSKD', 'FRSKD', 'PSKD', 'TASKS']

TASKS = ('classification', 'detection', 'segmentation', 'translation', 'language models')

# One default for all tasks, or one for each of those that have the option.
PSKD: Dict[str, Any] = {
    'alpha': {'classification': 0.3, 'detection': 0.8, 'segmentation': 0.3, 'translation': 0.3, 'language models': 0.3},
    'teacher': 'auto',
    'teacher_mode': 'train',
    'interval': None,
    'ema_decay': 0.999,
    'keep_hard': {task: task == 'detection' for task in TASKS},
    'background': True,
    'top_k': {'classification': None, 'translation': 8, 'language models': 8},
    'bank_dtype': {'classification': 'float32', 'translation': 'float16', 'language models': 'float16'},
    'bank_device': None,
    'bank_momentum': 0.0,
}

CSKD: Dict[str, Any] = {'weight': 1.0, 'temperature': 4.0}

FRSKD: Dict[str, Any] = {
    'alpha': {'classification': 2.0, 'detection': 0.5, 'segmentation': 1.0},
    'beta': {'classification': 100.0, 'detection': 1.0, 'segmentation': 50.0},
    'temperature': {'classification': 4.0, 'detection': 1.0, 'segmentation': 1.0},
}
