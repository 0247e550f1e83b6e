"""What the plugins for MMPretrain, MMDetection and MMSegmentation share."""

from selfkd.teacher import unwrap

from .checkpoints import allow_mmengine_checkpoints
from .hook import SelfKDHook, epoch_length, only_looks, training_progress
from .pair_sampler import PairBatchSampler, ViewBatchSampler
from .pskd_hook import PSKDHookBase
from .sample_index import SampleIndex

__all__ = [
    'PSKDHookBase',
    'PairBatchSampler',
    'SampleIndex',
    'SelfKDHook',
    'ViewBatchSampler',
    'allow_mmengine_checkpoints',
    'epoch_length',
    'only_looks',
    'training_progress',
    'unwrap',
]

allow_mmengine_checkpoints()
