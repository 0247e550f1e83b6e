"""Self-knowledge distillation in a training loop of your own: any DataLoader, any model, no toolkit."""

from .batches import Batches
from .cskd import CSKD
from .frskd import FRSKD
from .pskd import PSKD
from .tokens import TokenPSKD

__all__ = ['CSKD', 'FRSKD', 'PSKD', 'Batches', 'TokenPSKD']
