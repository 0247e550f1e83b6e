"""Distributions over many classes, of which a few are kept: the k likeliest, or drawn ones."""

from typing import NamedTuple

import torch
from torch import Tensor

from .transfer import to_device

__all__ = ['TopK', 'draw_top_k']

NUMBERS_AT_ONCE = {'cpu': 2**20}  # of logits: so many fit the cache; an accelerator wants more, to be kept busy
PIECES = 2**30


class TopK(NamedTuple):
    """A distribution over C classes kept as its k largest probabilities; the rest of the mass is spread evenly.

    Attributes:
        values: probabilities of the kept classes, ``[N, k]``.
        classes: their class ids, integers, ``[N, k]``, without repetition in a row.
    """

    values: Tensor
    classes: Tensor

    def rest(self, num_classes: int) -> Tensor:
        """Probability of each class that was not kept, ``[N]``."""
        others = num_classes - self.values.shape[1]
        if others == 0:
            return torch.zeros_like(self.values[:, 0])
        return (1 - self.values.sum(1)).clamp_(min=0) / others

    def dense(self, num_classes: int) -> Tensor:
        """The same distribution as probs ``[N, C]``."""
        probs = self.rest(num_classes)[:, None].repeat(1, num_classes)
        return probs.scatter_(1, self.classes.long(), self.values)


def draw_top_k(logits: Tensor, k: int, uniform: Tensor) -> TopK:
    """k classes of each prediction, drawn such that on average they are the prediction: for large vocabularies.

    The k largest and an even rest would be another distribution, a flatter one, and where a network learns from it and
    its predictions are kept again, this adds up. So the likeliest classes keep their probability p, the slots left go
    to classes drawn in proportion to p, and these share the rest of the mass evenly: each class is drawn with
    probability p / share, which is the drawing of the least variance (Fearnhead and Clifford, "On-line inference for
    hidden Markov models via particle filters", 2003). That the k largest are a biased teacher, and drawn ones are not:
    Anshumann et al., "Sparse Logit Sampling", ACL 2025, https://arxiv.org/abs/2503.16870

    Args:
        logits: ``[N, C]``, or log-probabilities; taken as a constant.
        k: classes to keep of each row, at most C.
        uniform: random numbers in [0, 1), ``[N]`` ([`selfkd.seeds.row_uniform`][]).

    Example:
        >>> probs = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(3000, 4)
        >>> drawn = draw_top_k(probs.log(), 2, torch.arange(3000) / 3000)
        >>> drawn.values[0], (drawn.dense(4).mean(0) - probs[0]).abs().max() < 0.02
        (tensor([0.7000, 0.3000]), tensor(True))
    """
    rows = max(1, NUMBERS_AT_ONCE.get(logits.device.type, 2**25) // logits.shape[1])
    if len(logits) > rows:
        parts = [draw_top_k(part, k, numbers) for part, numbers in zip(logits.split(rows), uniform.split(rows))]
        return TopK(*map(torch.cat, zip(*parts)))
    tail = logits.detach().softmax(1, dtype=torch.float32)
    top = tail.topk(k, dim=1)
    tail.scatter_(1, top.indices, 0)
    slots = torch.arange(k, device=tail.device)
    # Mass of a class and all smaller ones. (A cumsum of floats is not deterministic on CUDA.)
    remaining = tail.sum(1, keepdim=True) + (top.values[:, :, None] * (slots[:, None] >= slots)).sum(1)
    # Kept: what is above the share that it would have. Nearly above as well, lest rounding draws a class twice.
    kept = top.values * (k - slots) >= remaining * (1 - 1e-4)
    tail.scatter_(1, top.indices, top.values.masked_fill(kept, 0))
    first, total = kept.sum(1, keepdim=True), tail.sum(1, keepdim=True)
    left = (k - first).clamp(min=1)
    # Integers add up exactly. The mass is cut into 2^30 pieces; pieces at equal distances say which classes are drawn.
    steps = tail.div_(total.clamp(min=torch.finfo(tail.dtype).smallest_normal)).mul_(PIECES).round_().int()
    steps = steps.cumsum(1, dtype=torch.int32)
    points = (slots - first + to_device(uniform, tail.device)[:, None]) / left * steps[:, -1:]
    drawn = torch.searchsorted(steps, torch.minimum(points.int(), steps[:, -1:] - 1), right=True)
    drawn.clamp_(max=tail.shape[1] - 1)  # of what is not finite
    return TopK(torch.where(kept, top.values, total / left), torch.where(kept, top.indices, drawn))
