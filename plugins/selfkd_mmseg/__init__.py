"""Self-knowledge distillation for MMSegmentation."""

from .decode_head import ConvHead
from .efficientdet import EfficientDetNeck, EfficientDetSelfTeacher
from .frskd import FRSKDEncoderDecoder, SelfTeacher
from .metrics import PixelCalibrationMetric
from .pskd_hook import PSKDHook

__all__ = [
    'ConvHead',
    'EfficientDetNeck',
    'EfficientDetSelfTeacher',
    'FRSKDEncoderDecoder',
    'PSKDHook',
    'PixelCalibrationMetric',
    'SelfTeacher',
]
