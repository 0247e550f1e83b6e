"""Self-knowledge distillation for MMSegmentation."""

from .frskd import ConvHead, FRSKDEncoderDecoder, SelfTeacher
from .metrics import PixelCalibrationMetric
from .pskd_hook import PSKDHook

__all__ = ['ConvHead', 'FRSKDEncoderDecoder', 'PSKDHook', 'PixelCalibrationMetric', 'SelfTeacher']
