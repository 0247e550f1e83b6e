"""Self-knowledge distillation for Detectron2."""

from .config import add_selfkd_config, selfkd_hooks
from .frskd import FRSKDCascadeROIHeads, FRSKDROIHeads
from .hooks import CSKDHook, PSKDHook

__all__ = ['CSKDHook', 'FRSKDCascadeROIHeads', 'FRSKDROIHeads', 'PSKDHook', 'add_selfkd_config', 'selfkd_hooks']
