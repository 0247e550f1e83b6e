"""Self-knowledge distillation for MMPretrain."""

from .cskd_hook import CSKDHook
from .frskd_head import FRSKDClsHead
from .preact_resnet import PreActResNet
from .pskd_hook import PSKDHook

__all__ = ['CSKDHook', 'FRSKDClsHead', 'PSKDHook', 'PreActResNet']
