"""PS-KD as a callback of Lightning's Trainer, over a LightningModule that stays as it is."""

from .pskd import PSKD

__all__ = ['PSKD']
