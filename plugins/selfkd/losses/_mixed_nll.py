"""The cross-entropy against a mixed target that is never built, and its gradient, a few samples at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import tracing, wide
from ..topk import TopK
from ._common import class_dot, log_softmax, mix, of_rows, other_classes, row_slices, times


def mixed_nll(logits, labels, past, classes, alpha, smoothing=0.0, ignored=None, normalized=False, keep_hard=False):
    """mix(hard, soft, alpha) per sample: hard = -log p_y (smoothed), soft = -sum_c q_c log p_c, and 0 where ignored.

    ``labels`` are class ids ``[N, ...]``, or probs y ``[N, C, ...]`` with hard = -sum_c y_c log p_c. q is ``past``,
    probs ``[N, C, ...]``, or with ``classes`` top-k values. Without ``labels`` hard is 0, without ``past`` soft.
    ``normalized``: the logits are log p. Returns that and, as constants, its hard part, its soft part and -log p_y.
    """
    if tracing():  # torch.func and torch.compile differentiate (and compile) the plain operations
        log_probs = logits if normalized else log_softmax(logits)
        labels, past = _constant(labels), _constant(past)
        return terms_of(log_probs, labels, past, classes, alpha, smoothing, ignored, keep_hard)[:4]
    return _MixedNLL.apply(logits, labels, past, classes, alpha, smoothing, ignored, normalized, keep_hard)


def _constant(value):
    return value if value is None else value.detach()


def terms_of(log_probs, labels, past, classes, alpha, smoothing, ignored, keep_hard=False):
    """What ``mixed_nll`` returns, and the probability of each class that a top-k past has not kept."""
    zero = log_probs.new_zeros(()).expand(log_probs.shape[:1] + log_probs.shape[2:])
    total = log_probs.sum(1) if smoothing or classes is not None else None
    nll = hard = soft = zero
    rest = zero
    if classes is not None:
        classes = classes.long()
        kept, rest = log_probs.gather(1, classes), TopK(past, classes).rest(log_probs.shape[1])
        others = total - kept.sum(1)
        rest = rest.masked_fill(~others.isfinite(), 0)  # next to masked classes, what was not kept is left out
        soft = -(class_dot(past, kept) + times(rest, others))
    elif past is not None:
        soft = -class_dot(past, log_probs)
    if labels is not None and labels.is_floating_point():
        hard = -class_dot(labels, log_probs)
    elif labels is not None:
        nll = -log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)
        each = smoothing / other_classes(log_probs)
        hard = (1 - smoothing - each) * nll - each * total if smoothing else nll.clone()
    terms = [mix(hard, soft, alpha, keep_hard=keep_hard), hard, soft, nll]
    if ignored is not None:
        terms = [term.masked_fill(ignored, 0) for term in terms]
    return (*terms, rest)


class _MixedNLL(torch.autograd.Function):
    """``terms_of``, of which no tensor of the logits' size is kept but the logits themselves.

    Plain autograd keeps the log-probabilities in float32, beside half-precision logits twice their size, and writes one
    such tensor per term in its backward pass. Here the log-probabilities of a few samples are made, and made again for
    the gradient, which is written once, in the logits' dtype: with respect to the log-probabilities it is minus the
    mixed target.
    """

    @staticmethod
    def forward(ctx, logits, labels, past, classes, alpha, smoothing, ignored, normalized, keep_hard):
        dtype, samples = wide(logits.dtype), logits.shape[:1] + logits.shape[2:]
        terms = [logits.new_empty(samples, dtype=dtype) for _ in range(5)]
        for rows in row_slices(logits):
            log_probs = logits[rows] if normalized else log_softmax(logits[rows])
            part_of = (of_rows(labels, rows, dtype), of_rows(past, rows, dtype), of_rows(classes, rows))
            parts = terms_of(log_probs, *part_of, of_rows(alpha, rows), smoothing, of_rows(ignored, rows), keep_hard)
            for term, part in zip(terms, parts):
                term[rows] = part
        rest = terms.pop()
        of_tensor = alpha if isinstance(alpha, Tensor) else None
        ctx.save_for_backward(logits, labels, past, classes, rest, of_tensor, ignored)
        ctx.alpha, ctx.smoothing, ctx.normalized, ctx.keep_hard = alpha, smoothing, normalized, keep_hard
        ctx.mark_non_differentiable(*terms[1:])
        return tuple(terms)

    @staticmethod
    def backward(ctx, grad, *unused):
        logits, labels, past, classes, rest, alpha, ignored = ctx.saved_tensors
        alpha = ctx.alpha if alpha is None else alpha
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for: by the plain operations
            log_probs = logits if ctx.normalized else log_softmax(logits)
            labels, past = (of_rows(x, slice(None), log_probs.dtype) for x in (labels, past))
            losses = terms_of(log_probs, labels, past, classes, alpha, ctx.smoothing, ignored, ctx.keep_hard)[0]
            return (*torch.autograd.grad(losses, logits, grad, create_graph=True), *[None] * 8)
        if ignored is not None:
            grad = grad.masked_fill(ignored, 0)
        soft, hard = -alpha * grad, -grad if ctx.keep_hard else grad * (alpha - 1)
        gradient, dtype = torch.empty_like(logits), wide(logits.dtype)
        for rows in row_slices(logits):
            probs = None if ctx.normalized else F.softmax(logits[rows], 1, dtype=dtype)
            part_of = (of_rows(labels, rows, dtype), of_rows(past, rows, dtype), of_rows(classes, rows))
            weights = (hard[rows].unsqueeze(1), soft[rows].unsqueeze(1))
            settings = (rest[rows], ctx.smoothing, of_rows(ignored, rows), *weights)
            place = gradient[rows] if gradient.dtype == dtype and not ctx.normalized else None
            part = gradient_of_terms(probs, logits[rows], *part_of, *settings, out=place)
            if place is None:
                gradient[rows] = part
        return (gradient, *[None] * 8)


def gradient_of_terms(probs, logits, labels, past, classes, rest, smoothing, ignored, hard, soft, out=None):
    """Of the losses, with respect to the logits: each one's share of the softmax, less the target.

    ``hard`` and ``soft``, ``[N, 1, ...]``, are minus the weights of the two parts. ``probs`` is the logits' softmax,
    which the gradient overwrites if it has no ``out``; None: the logits are normalised, and it is minus the target.
    """
    if ignored is not None and classes is not None:  # whose past may hold anything
        past = past.masked_fill(ignored.unsqueeze(1), 0)
        rest = rest.masked_fill(ignored, 0)
    rest = rest.unsqueeze(1)
    each = smoothing / other_classes(logits)  # what every class gets from the smoothed label
    own = 1 - smoothing - each  # what the label's own gets besides
    ids = labels is not None and not labels.is_floating_point()
    if probs is None:
        gradient = torch.zeros_like(logits, dtype=wide(logits.dtype))
    else:
        share = torch.zeros_like(hard)
        if labels is not None:
            share = share - hard * (own + each * logits.shape[1] if ids else labels.sum(1, keepdim=True))
        if past is not None:
            left = logits.shape[1] - past.shape[1]
            share = share - soft * (past.sum(1, keepdim=True) + (rest * left if classes is not None else 0))
        gradient = torch.mul(probs, share, out=probs if out is None else out)
    if classes is not None or smoothing:
        gradient += hard * each + (soft * rest if classes is not None else 0)
    if classes is not None:
        gradient.scatter_add_(1, classes.long(), soft * (past - rest))
    elif past is not None:
        gradient.addcmul_(soft, past)
    if ids:
        gradient.scatter_add_(1, labels.unsqueeze(1), hard * own)
    elif labels is not None:
        gradient.addcmul_(hard, labels)
    if ignored is not None and classes is None and past is not None:
        gradient.masked_fill_(ignored.unsqueeze(1), 0)
    return gradient
