"""Self-knowledge distillation for MMSegmentation."""

from .pskd_hook import PSKDHook

__all__ = ['PSKDHook']
