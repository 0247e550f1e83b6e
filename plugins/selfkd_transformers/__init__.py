"""Self-knowledge distillation as mix-ins of the Trainer of Hugging Face transformers."""

from .cskd import CSKDArguments, CSKDMixin, CSKDTrainer, CSKDTrainingArguments
from .frskd import FRSKDArguments, FRSKDMixin, FRSKDTrainer, FRSKDTrainingArguments
from .pskd import PSKDArguments, PSKDMixin, PSKDTrainer, PSKDTrainingArguments

__all__ = ['CSKDArguments', 'CSKDMixin', 'CSKDTrainer', 'CSKDTrainingArguments']
__all__ += ['FRSKDArguments', 'FRSKDMixin', 'FRSKDTrainer', 'FRSKDTrainingArguments']
__all__ += ['PSKDArguments', 'PSKDMixin', 'PSKDTrainer', 'PSKDTrainingArguments']
