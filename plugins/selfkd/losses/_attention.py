"""Attention transfer and its gradient, beside which nothing takes the memory of a feature map."""

import functools
import math

import torch
import torch.nn.functional as F

from ..checks import free_to_look, tracing, wide
from ..transfer import to_device
from ._common import row_slices

SAFE = 1e-5, 1e7  # the squares of the squares of such values are well within float32


def attention_distance(students, teachers):
    """The mean of (a(F) - a(T))^2, summed over the levels; a gradient for the students alone."""
    teachers = [teacher.detach() for teacher in teachers]
    if tracing():
        return _distance(students, teachers)
    if len({len(student) for student in students}) > 1:
        return sum(_AttentionDistance.apply(teachers[i : i + 1], students[i]) for i in range(len(students)))
    return _AttentionDistance.apply(teachers, *students)


def _distance(students, teachers):
    distance = 0
    for student, teacher in zip(students, teachers):
        difference = _attention(student) - _attention(teacher)
        distance = distance + difference.pow(2).sum() / max(difference.numel(), 1)
    return distance


def _attention(maps):
    maps = maps.to(wide(maps.dtype)).flatten(2)
    # Squares of very small and very large values are beyond float32; a(F) is the same for any multiple of F.
    peaks = maps.detach().abs().amax((1, 2), keepdim=True)
    return F.normalize((maps / peaks.masked_fill(peaks == 0, 1)).pow(2).mean(1))


class _AttentionDistance(torch.autograd.Function):
    """:func:`_distance`, of which only the gradient is of the maps' size.

    What is as small as an attention map lies in one tensor ``[levels, N, positions]``, filled up with zeros, so that a
    GPU starts one kernel for all levels.
    """

    @staticmethod
    def forward(ctx, teachers, *students):
        levels, maps = len(students), [x.flatten(2) for x in (*students, *teachers)]
        dtype = wide(functools.reduce(torch.promote_types, (x.dtype for x in maps)))
        size = len(maps[0]), max(x.shape[2] for x in maps)
        attention = maps[0].new_zeros(len(maps), *size, dtype=dtype)
        scale = None
        if not (all(map(free_to_look, maps)) and _safe(_norms_into(attention, maps))):
            scale = _scale(maps, dtype)
            _norms_into(attention, maps, scale)
        lengths = torch.linalg.vector_norm(attention.square_(), dim=2, keepdim=True).clamp_(min=1e-12)
        student, difference = attention.div_(lengths).view(2, levels, *size)
        torch.sub(student, difference, out=difference)
        numbers = torch.tensor([max(len(x) * x.shape[2], 1) for x in maps[:levels]], dtype=dtype, device='cpu')
        numbers = to_device(numbers, difference.device)
        scale = scale if scale is None else scale[:levels]
        ctx.save_for_backward(student, difference, lengths[:levels], scale, numbers, *students, *teachers)
        return (difference.square().sum((1, 2)) / numbers).sum()

    @staticmethod
    def backward(ctx, grad):
        attention, difference, lengths, scale, numbers, *maps = ctx.saved_tensors
        students, teachers = maps[: len(attention)], maps[len(attention) :]
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for: by the plain operations
            wanted = [x for x, needed in zip(students, ctx.needs_input_grad[1:]) if needed]
            found = iter(torch.autograd.grad(_distance(students, teachers), wanted, grad, create_graph=True))
            return (None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:]))
        # a = s / |s| for the sums of squares s: through the division, then through the squares
        share = difference * (4 * grad / numbers).view(-1, 1, 1)
        share.addcmul_(attention, (attention * share).sum(2, keepdim=True), value=-1).div_(lengths)
        if scale is not None:
            share /= scale.unsqueeze(2)
        gradients = []
        for i, student in enumerate(students):
            x = student.flatten(2)
            gradient, factor = torch.empty_like(x), share[i, :, None, : x.shape[2]]
            for rows in row_slices(x):
                part = _divided(x[rows], None if scale is None else scale[i, rows], out=gradient[rows])
                torch.mul(part, factor[rows], out=gradient[rows])
            gradients.append(gradient.view(student.shape))
        return (None, *gradients)


def _norms_into(out, maps, scale=None):
    """Of the channels at each position, ``[maps, N, positions]``."""
    for i, x in enumerate(maps):
        norms = out[i, :, : x.shape[2]]
        for rows in row_slices(x):
            part = _divided(x[rows], None if scale is None else scale[i, rows])
            if part.device.type == 'cpu':  # where vector_norm takes six times as long
                torch.sum(part.to(out.dtype).square(), 1, out=norms[rows]).sqrt_()
            else:
                torch.linalg.vector_norm(part, dim=1, dtype=out.dtype, out=norms[rows])
    return out


def _safe(norms):
    peaks = norms.amax(2)
    return peaks.min() > SAFE[0] and peaks.max() < SAFE[1]


def _scale(maps, dtype):
    """A power of two near the largest value of each sample, ``[maps, samples]``: to divide by it is exact."""
    peaks = maps[0].new_empty(len(maps), len(maps[0]), dtype=dtype)
    for x, out in zip(maps, peaks):
        for rows in row_slices(x):
            torch.linalg.vector_norm(x[rows], math.inf, dim=(1, 2), dtype=dtype, out=out[rows])
    peaks.masked_fill_(peaks == 0, 1)
    return peaks / torch.frexp(peaks).mantissa.mul_(2)


def _divided(maps, scale, out=None):
    return maps if scale is None else torch.div(maps, scale.to(maps.dtype)[:, None, None], out=out)
