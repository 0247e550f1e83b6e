"""Self-knowledge distillation for MMPretrain."""

from .preact_resnet import PreActResNet
from .pskd_hook import PSKDHook

__all__ = ['PSKDHook', 'PreActResNet']
