"""Self-knowledge distillation for MMPretrain."""

from .byot_head import BYOTClsHead
from .cifar_backbones import (
    DenseNet_CIFAR,
    PyramidNet_CIFAR,
    ResNeXt_CIFAR,
    WideResNet_CIFAR,
)
from .cskd_hook import CSKDHook
from .data import SVHN, FloatColorJitter
from .ddgsd_hook import DDGSDHook
from .frskd import FRSKDImageClassifier
from .metrics import CalibrationMetric, KeepFeaturesHook, MarkOOD, OODMetric, RecallAt1, SelectiveMetric
from .preact_resnet import PreActResNet
from .pskd_hook import PSKDHook
from .tfkd_hook import TFKDHook

__all__ = [
    'BYOTClsHead',
    'CSKDHook',
    'CalibrationMetric',
    'DDGSDHook',
    'DenseNet_CIFAR',
    'FRSKDImageClassifier',
    'FloatColorJitter',
    'KeepFeaturesHook',
    'MarkOOD',
    'OODMetric',
    'PSKDHook',
    'PreActResNet',
    'PyramidNet_CIFAR',
    'RecallAt1',
    'ResNeXt_CIFAR',
    'SVHN',
    'SelectiveMetric',
    'TFKDHook',
    'WideResNet_CIFAR',
]
