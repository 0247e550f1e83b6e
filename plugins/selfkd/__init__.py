"""Self-knowledge distillation: the shared math. Needs torch, and no toolkit.

>>> import torch, selfkd
>>> selfkd.losses.pskd_loss(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[0.5, 0.5]]), alpha=0.5)
tensor(0.6931)
"""

from . import bank, losses, metrics, schedule, teacher

__version__ = '0.1.0'
__all__ = ['bank', 'losses', 'metrics', 'schedule', 'teacher']
