"""Self-knowledge distillation for MMDetection."""

from .cskd_hook import CSKDHook
from .frskd_head import FRSKDRoIHead
from .metrics import DetectionCalibration
from .pskd_hook import PSKDHook

__all__ = ['CSKDHook', 'DetectionCalibration', 'FRSKDRoIHead', 'PSKDHook']
