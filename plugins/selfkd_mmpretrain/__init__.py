"""Self-knowledge distillation for MMPretrain."""

from .cifar_backbones import DenseNet_CIFAR, PreReluResNet_CIFAR, PyramidNet_CIFAR, ResNeXt_CIFAR, WideResNet_CIFAR
from .cskd_hook import CSKDHook
from .frskd_head import FRSKDClsHead
from .preact_resnet import PreActResNet
from .pskd_hook import PSKDHook

__all__ = [
    'CSKDHook',
    'DenseNet_CIFAR',
    'FRSKDClsHead',
    'PSKDHook',
    'PreActResNet',
    'PreReluResNet_CIFAR',
    'PyramidNet_CIFAR',
    'ResNeXt_CIFAR',
    'WideResNet_CIFAR',
]
