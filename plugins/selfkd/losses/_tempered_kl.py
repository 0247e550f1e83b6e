"""The KL divergence of two tempered predictions, a few samples at a time."""

import torch

from ..checks import tracing, wide
from ._common import kl, log_softmax, row_slices


def tempered_kl(student, teacher, temperature):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) per sample; a gradient for the student alone."""
    if tracing():
        return _losses(student, teacher.detach(), temperature)
    return _TemperedKL.apply(student, teacher.detach(), temperature)


def _tempered(logits, temperature):
    logits = logits.to(wide(logits.dtype))  # first: a half divided by a small T overflows
    return logits / temperature if temperature != 1 else logits  # on large maps a division takes time


def _losses(student, teacher, temperature):
    log_probs = (log_softmax(_tempered(logits, temperature)) for logits in (teacher, student))
    return temperature**2 * kl(*log_probs)


class _TemperedKL(torch.autograd.Function):
    """``_losses``, of which no tensor of the logits' size is kept but the logits; the gradient is T (p - q)."""

    @staticmethod
    def forward(ctx, student, teacher, temperature):
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        losses = student.new_empty(student.shape[:1] + student.shape[2:], dtype=wide(student.dtype))
        for rows in row_slices(student):
            losses[rows] = _losses(student[rows], teacher[rows], temperature)
        return losses

    @staticmethod
    def backward(ctx, grad):
        student, teacher = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for: by the plain operations
            losses = _losses(student, teacher, ctx.temperature)
            return (*torch.autograd.grad(losses, student, grad, create_graph=True), None, None)
        gradient = torch.empty_like(student)
        for rows in row_slices(student):
            difference = _tempered(student[rows], ctx.temperature).softmax(1)
            difference -= _tempered(teacher[rows], ctx.temperature).softmax(1)
            torch.mul(difference, ctx.temperature * grad[rows].unsqueeze(1), out=gradient[rows])
        return gradient, None, None
