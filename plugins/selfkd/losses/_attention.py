"""Attention transfer and its gradient, beside which nothing takes the memory of a feature map."""

import functools

import torch
import torch.nn.functional as F

from ..checks import free_to_look, tracing, wide
from ..transfer import to_device
from ._common import row_slices

SAFE = 1e-15, 1e15  # the squares of such norms are within float32


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
    """``_distance``, of which only the gradient is of the maps' size.

    What is as small as an attention map lies in one tensor ``[levels, N, positions]``, filled up with zeros, so that a
    GPU starts one kernel for all levels. Maps on the CPU whose squares are beyond float32 go through the plain
    operations, which scale them first. A GPU is not asked: the largest value of a sample counts as 0 below 1e-19, and
    gives NaN above 1e19.
    """

    @staticmethod
    def forward(ctx, teachers, *students):
        maps = [x.flatten(2) for x in (*students, *teachers)]
        dtype = wide(functools.reduce(torch.promote_types, (x.dtype for x in maps)))
        norms = maps[0].new_zeros(len(maps), len(maps[0]), max(x.shape[2] for x in maps), dtype=dtype)
        for x, out in zip(maps, norms):
            for rows in row_slices(x):
                _norms(x[rows], out=out[rows, : x.shape[2]])
        peaks = norms.amax(2, keepdim=True)
        ctx.plain = all(map(free_to_look, maps)) and not (peaks.min() > SAFE[0] and peaks.max() < SAFE[1])
        if ctx.plain:
            ctx.save_for_backward(*students, *teachers)
            return _distance(students, teachers)
        peaks.masked_fill_(peaks == 0, 1)
        squares = norms.div_(peaks).square_()  # a(F) is the same for any multiple of F
        lengths = torch.linalg.vector_norm(squares, dim=2, keepdim=True).clamp_(min=1e-12)
        student, difference = squares.div_(lengths).unflatten(0, (2, len(students)))
        torch.sub(student, difference, out=difference)
        numbers = torch.tensor([max(len(x) * x.shape[2], 1) for x in maps[: len(students)]], dtype=dtype, device='cpu')
        numbers = to_device(numbers, difference.device)
        of_students = (part[: len(students)] for part in (lengths, peaks))
        ctx.save_for_backward(*students, *teachers, student, difference, *of_students, numbers)
        return (difference.square().sum((1, 2)) / numbers).sum()

    @staticmethod
    def backward(ctx, grad):
        levels = len(ctx.needs_input_grad) - 1
        students, teachers = ctx.saved_tensors[:levels], ctx.saved_tensors[levels : 2 * levels]
        if ctx.plain or torch.is_grad_enabled():  # or a gradient of the gradient is asked for
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                students = [x.view_as(x) for x in students]  # one level's map may be made from another's
                wanted = [x for x, needed in zip(students, ctx.needs_input_grad[1:]) if needed]
                found = iter(torch.autograd.grad(_distance(students, teachers), wanted, grad, create_graph=again))
            return (None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:]))
        attention, difference, lengths, peaks, numbers = ctx.saved_tensors[2 * levels :]
        # a = s / |s| for the sums of squares s: through the division, then through the squares
        share = difference * (4 * grad / numbers).view(-1, 1, 1)
        share.addcmul_(attention, (attention * share).sum(2, keepdim=True), value=-1).div_(lengths * peaks.square())
        gradients = []
        for student, factor in zip(students, share.unsqueeze(2)):
            x = student.flatten(2)
            gradient = torch.empty_like(x)
            for rows in row_slices(x):
                torch.mul(x[rows], factor[rows, :, : x.shape[2]], out=gradient[rows])
            gradients.append(gradient.view(student.shape))
        return (None, *gradients)


def _norms(maps, out):
    """Of the channels at each position, ``[N, positions]``."""
    if maps.device.type == 'cpu':  # where vector_norm takes six times as long
        torch.sum(maps.to(out.dtype).square(), 1, out=out).sqrt_()
    else:
        torch.linalg.vector_norm(maps, dim=1, dtype=out.dtype, out=out)
