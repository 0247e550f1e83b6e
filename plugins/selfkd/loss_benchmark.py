"""What PS-KD's loss costs by itself, against torch's cross-entropy."""

from typing import List

import torch
import torch.nn.functional as F

from .benchmark import Cost, compare
from .losses import TopK, pskd_loss

__all__ = ['loss_suite']


def loss_suite(device: str = 'cpu') -> List[Cost]:
    """PS-KD's loss against ``torch.nn.functional.cross_entropy``, 1024 x 32000 logits, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1024, 32000, generator=generator).to(device).requires_grad_()
    labels = torch.randint(32000, (1024,), generator=generator).to(device)
    past = torch.randn(1024, 32000, generator=generator).softmax(1).to(device)
    top = TopK(*past.topk(8, 1))

    def step(loss):
        def run():
            loss().backward()
            logits.grad = None

        return run

    def composed():  # the target built, then torch's own loss
        target = 0.6 * F.one_hot(labels, 32000) + 0.4 * past
        return F.cross_entropy(logits, target)

    def identity():  # how research scripts do it: the one-hot label is a row of an identity matrix
        target = 0.6 * torch.eye(32000, device=device)[labels] + 0.4 * past
        return torch.mean(torch.sum(-target * F.log_softmax(logits, dim=1), dim=1))

    return compare(
        {
            'F.cross_entropy': step(lambda: F.cross_entropy(logits, labels)),
            'pskd_loss, dense past': step(lambda: pskd_loss(logits, labels, past, 0.4)),
            'pskd_loss, top-8 past': step(lambda: pskd_loss(logits, labels, top, 0.4)),
            'target built, then F.cross_entropy': step(composed),
            'identity matrix, sum of products': step(identity),
        }
    )
