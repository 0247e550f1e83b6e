"""Self-knowledge distillation as callbacks of Lightning's Trainer, over a LightningModule that stays as it is."""

from .cskd import CSKD
from .frskd import FRSKD
from .pskd import PSKD

__all__ = ['CSKD', 'FRSKD', 'PSKD']
