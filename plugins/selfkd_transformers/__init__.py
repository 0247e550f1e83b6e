"""PS-KD in the Trainer of Hugging Face transformers, for any model that computes a cross-entropy."""

from .pskd import PSKDArguments, PSKDMixin, PSKDTrainingArguments

__all__ = ['PSKDArguments', 'PSKDMixin', 'PSKDTrainingArguments']
