"""The cross-entropy against a mixed target that is never built, and its gradient in one piece."""

import torch
from torch import Tensor

from ..checks import tracing
from ..topk import TopK
from ._common import class_dot, other_classes, times


def mixed_nll(log_probs, labels, past, classes, alpha, smoothing, ignored):
    """(1-a) hard + a soft per sample: hard = -log p_y (smoothed), soft = -sum_c q_c log p_c, and 0 where ignored.

    q is ``past``, probs ``[N, C, ...]``, or with ``classes`` top-k values. Without ``labels`` hard is 0, without
    ``past`` soft. Returns that and, as constants, its hard part, its soft part and -log p_y.
    """
    if tracing():  # torch.func and torch.compile differentiate (and compile) the plain operations
        past = past if past is None else past.detach()
        return _mixed_nll_terms(log_probs, labels, past, classes, alpha, smoothing, ignored)[:4]
    return _MixedNLL.apply(log_probs, labels, past, classes, alpha, smoothing, ignored)


def _mixed_nll_terms(log_probs, labels, past, classes, alpha, smoothing, ignored):
    """What :func:`mixed_nll` returns, and the probability of each class that a top-k past has not kept."""
    zero = log_probs.new_zeros(()).expand(log_probs.shape[:1] + log_probs.shape[2:])
    total = log_probs.sum(1) if smoothing or classes is not None else None
    nll = hard = soft = zero
    rest = None
    if classes is not None:
        classes = classes.long()
        kept, rest = log_probs.gather(1, classes), TopK(past, classes).rest(log_probs.shape[1])
        others = total - kept.sum(1)
        rest = rest.masked_fill(~others.isfinite(), 0)  # next to masked classes, what was not kept is left out
        soft = -(class_dot(past, kept) + times(rest, others))
    elif past is not None:
        soft = -class_dot(past, log_probs)
    if labels is not None:
        nll = -log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)
        each = smoothing / other_classes(log_probs)
        hard = (1 - smoothing - each) * nll - each * total if smoothing else nll.clone()
    terms = [times(1 - alpha, hard) + times(alpha, soft), hard, soft, nll]
    if ignored is not None:
        terms = [term.masked_fill(ignored, 0) for term in terms]
    return (*terms, rest)


class _MixedNLL(torch.autograd.Function):
    """:func:`_mixed_nll_terms`, which is linear in ``log_probs``, with its gradient in one piece.

    The only thing plain autograd does worse: the gradient with respect to ``log_probs`` is minus the mixed target,
    and here it is written once (-a q, or for a top-k past a constant row, then the label's share on top)
    where composed operations write and add one N x C tensor per term.
    """

    @staticmethod
    def forward(ctx, log_probs, labels, past, classes, alpha, smoothing, ignored):
        if past is not None and past.dtype == torch.float64:
            past = past.to(log_probs.dtype)
        *terms, rest = _mixed_nll_terms(log_probs, labels, past, classes, alpha, smoothing, ignored)
        ctx.save_for_backward(labels, past, classes, rest, alpha if isinstance(alpha, Tensor) else None, ignored)
        ctx.alpha, ctx.smoothing, ctx.shape = alpha, smoothing, log_probs.shape
        ctx.mark_non_differentiable(*terms[1:])
        return tuple(terms)

    @staticmethod
    def backward(ctx, grad, *unused):
        labels, past, classes, rest, alpha, ignored = ctx.saved_tensors
        alpha = ctx.alpha if alpha is None else alpha
        if ignored is not None:
            grad = grad.masked_fill(ignored, 0)
        soft, hard = (-alpha * grad).unsqueeze(1), (grad * (alpha - 1)).unsqueeze(1)
        each = ctx.smoothing / max(ctx.shape[1] - 1, 1)
        row = hard * each  # what every class of the sample gets from the smoothed label
        if classes is not None:
            grad_log_probs = (row + soft * rest.unsqueeze(1)).repeat(1, ctx.shape[1])
            grad_log_probs.scatter_(1, classes.long(), row + soft * past)
        elif past is not None:
            grad_log_probs = soft * past
            if ctx.smoothing:
                grad_log_probs += row
            if ignored is not None:  # whose past may hold anything
                grad_log_probs.masked_fill_(ignored.unsqueeze(1), 0)
        else:
            grad_log_probs = row.expand(ctx.shape).clone()
        if labels is not None:
            grad_log_probs.scatter_add_(1, labels.unsqueeze(1), hard * (1 - ctx.smoothing - each))
        return grad_log_probs, None, None, None, None, None, None
