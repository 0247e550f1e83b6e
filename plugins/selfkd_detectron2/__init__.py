"""Self-knowledge distillation for Detectron2."""

from .config import SelfKDTrainer, add_selfkd_config, check_classes, selfkd_hooks, with_self_teacher
from .evaluation import DetectionCalibration
from .frskd import FRSKDCascadeROIHeads, FRSKDROIHeads
from .hooks import CSKDHook, FRSKDHook, PSKDHook

__all__ = [
    'CSKDHook',
    'DetectionCalibration',
    'FRSKDCascadeROIHeads',
    'FRSKDHook',
    'FRSKDROIHeads',
    'PSKDHook',
    'SelfKDTrainer',
    'add_selfkd_config',
    'check_classes',
    'selfkd_hooks',
    'with_self_teacher',
]
