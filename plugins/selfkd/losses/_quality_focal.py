"""The sum of the quality focal loss, a few numbers at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import tracing, wide
from ._common import row_slices


def quality_focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """|t - p|^gamma BCE(p, t) of each number, in float32 or wider; p is the sigmoid of the logit, t the target."""
    logits = logits.to(wide(logits.dtype))
    target = target.to(logits.dtype)
    distance = (target - logits.sigmoid()).abs()
    return distance**gamma * F.binary_cross_entropy_with_logits(logits, target, reduction='none')


def quality_focal_sum(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Their sum."""
    if tracing():
        return quality_focal(logits, target, gamma).sum()
    return _Sum.apply(logits.flatten(), target.flatten(), gamma)


class _Sum(torch.autograd.Function):
    """Keeps the logits and the target only. Plain autograd keeps six more tensors of their size."""

    @staticmethod
    def forward(ctx, logits, target, gamma):
        ctx.save_for_backward(logits, target)
        ctx.gamma = gamma
        total = logits.new_zeros((), dtype=wide(logits.dtype))
        for part in row_slices(logits):
            total += quality_focal(logits[part], target[part], gamma).sum()
        return total

    @staticmethod
    def backward(ctx, grad):
        logits, target = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for: by the plain operations
            total = quality_focal(logits, target, ctx.gamma).sum()
            return (*torch.autograd.grad(total, logits, grad, create_graph=True), None, None)
        gradient = torch.empty_like(logits)
        for part in row_slices(logits):
            with torch.enable_grad():
                numbers = logits[part].detach().requires_grad_()
                total = quality_focal(numbers, target[part], ctx.gamma).sum()
            (of_part,) = torch.autograd.grad(total, numbers)
            torch.mul(of_part, grad, out=gradient[part])
        return gradient, None, None
