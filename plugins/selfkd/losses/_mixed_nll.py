"""The cross-entropy against a mixed target that is never built, and its gradient, a few samples at a time."""

from typing import Iterable, List, NamedTuple, Optional, Union

import torch
from torch import Tensor

from ..checks import tracing, wide
from ..topk import TopK
from ._common import (
    class_dot,
    counted,
    log_softmax,
    mix,
    of_rows,
    other_classes,
    reduce,
    row_slices,
    softmax_and_log,
    times,
    weights,
)


class Mixture(NamedTuple):
    """What a loss is mixed of: mix(hard, soft, alpha) with hard = -log p_y (smoothed), soft = -sum_c q_c log p_c.

    All of it is constant: no gradient flows into it.

    Attributes:
        labels: class ids ``[N, ...]``, or probs y ``[N, C, ...]`` with hard = -sum_c y_c log p_c. None: hard is 0.
        past: q, probs ``[N, C, ...]``, or with ``classes`` top-k values ``[N, k]``. None: soft is 0.
        classes: of the top-k values.
        alpha: a number, or a tensor ``[N, ...]`` or ``[]``.
        smoothing: share of the label that is spread over the other classes.
        ignored: bool ``[N, ...]``, where the loss is 0.
        normalized: the logits are log p.
        keep_hard: the hard part keeps its whole weight.
    """

    labels: Optional[Tensor]
    past: Optional[Tensor]
    classes: Optional[Tensor]
    alpha: Union[float, Tensor]
    smoothing: float = 0.0
    ignored: Optional[Tensor] = None
    normalized: bool = False
    keep_hard: bool = False

    def rows(self, rows: slice, dtype: torch.dtype) -> 'Mixture':
        """Of some of the samples, the probs in ``dtype``."""
        probs = {name: of_rows(getattr(self, name), rows, dtype) for name in ('labels', 'past')}
        others = {name: of_rows(getattr(self, name), rows) for name in ('classes', 'alpha', 'ignored')}
        return self._replace(**probs, **others)

    def tensors(self) -> List[Optional[Tensor]]:
        """For ``save_for_backward``, which lets go of them after the backward pass: one for each attribute, or None."""
        return [value if isinstance(value, Tensor) else None for value in self]

    def without_tensors(self) -> 'Mixture':
        return Mixture._make(None if isinstance(value, Tensor) else value for value in self)

    def with_tensors(self, tensors: Iterable[Optional[Tensor]]) -> 'Mixture':
        return Mixture._make(value if tensor is None else tensor for value, tensor in zip(self, tensors))


def mixed_nll(logits: Tensor, mixture: Mixture, reduction: str = 'none', check=None):
    """The loss of a mixture, reduced, and per sample and as constants its hard part, its soft part and -log p_y.

    ``check`` is called with the sums and the least values of a dense past's rows.
    """
    if tracing():  # torch.func and torch.compile differentiate (and compile) the plain operations
        log_probs = logits if mixture.normalized else log_softmax(logits)
        losses, *parts = terms_of(log_probs, _without_ignored_past(mixture))[:4]
        return (reduce(losses, reduction, mixture.ignored), *parts)
    early = reduction != 'none' and logits.device.type == 'cpu' and not mixture.normalized and torch.is_grad_enabled()
    return _MixedNLL.apply(logits, mixture, reduction, early, check)


def _without_ignored_past(mixture: Mixture) -> Mixture:
    """The past may hold anything where it is ignored, and plain operations' gradients multiply that with 0."""
    labels, past, classes, alpha, smoothing, ignored, normalized, keep_hard = mixture
    if past is not None and ignored is not None:
        past = past.masked_fill(ignored.unsqueeze(1), 0)
    return Mixture(labels, past, classes, alpha, smoothing, ignored, normalized, keep_hard)


def terms_of(log_probs, mixture, spent=False):
    """Of each sample the loss, its hard part, its soft part, -log p_y, and the probability of each class that a top-k
    past has not kept.

    ``spent``: the log-probabilities are not needed any more, and are overwritten.
    """
    labels, past, classes, alpha, smoothing, ignored, _, keep_hard = mixture
    zero = log_probs.new_zeros(()).expand(log_probs.shape[:1] + log_probs.shape[2:])
    total = log_probs.sum(1) if smoothing or classes is not None else None
    nll = hard = soft = rest = zero
    if labels is not None and labels.is_floating_point():
        hard = -class_dot(labels, log_probs)
    elif labels is not None:
        nll = -log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)
        each = smoothing / other_classes(log_probs)
        hard = (1 - smoothing - each) * nll - each * total if smoothing else nll.clone()
    if classes is not None:
        classes = classes.long()
        kept, rest = log_probs.gather(1, classes), TopK(past, classes).rest(log_probs.shape[1])
        others = total - kept.sum(1)
        rest = rest.masked_fill(~others.isfinite(), 0)  # next to masked classes, what was not kept is left out
        soft = -(class_dot(past, kept) + times(rest, others))
    elif past is not None:
        soft = -class_dot(past, log_probs, out=log_probs if spent else None)
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

    On CPUs it is written ``early``, in the forward pass, where a slice's softmax and past are in the cache, and kept.
    The first backward pass takes it, and may scale it. A second one makes it again.
    """

    @staticmethod
    def forward(ctx, logits, mixture, reduction, early, check):
        dtype, samples = wide(logits.dtype), logits.shape[:1] + logits.shape[2:]
        terms = [logits.new_empty(samples, dtype=dtype) for _ in range(5)]
        looks, slices = [], list(row_slices(logits))
        gradient = torch.empty_like(logits) if early and slices and ctx.needs_input_grad[0] else None
        if gradient is not None:
            minus = _minus_weights(mixture, terms[0].new_ones(()), reduction, samples)
            # The same memory for every slice, so that it stays in the cache.
            buffers = [logits.new_empty(logits[slices[0]].shape, dtype=dtype) for _ in range(2)]
        for rows in slices:
            part = mixture.rows(rows, dtype)
            if gradient is not None:
                of_part = [weight[rows] for weight in minus]
                found = _terms_and_gradient(logits[rows], part, of_part, gradient[rows], buffers)
            elif mixture.normalized:
                found = terms_of(logits[rows], part)
            else:
                found = terms_of(log_softmax(logits[rows]), part, spent=True)
            for term, value in zip(terms, found):
                term[rows] = value
            if check is not None:
                looks.append((part.past.sum(1), part.past.amin(1)))
        if looks:
            check(*map(torch.cat, zip(*looks)))
        losses, *parts, rest = terms
        keeper = rest.new_empty(0)  # what drops saved tensors (a checkpoint) or moves them drops the gradient as well
        keeper.gradient = gradient
        ctx.save_for_backward(logits, rest, keeper, *mixture.tensors())
        ctx.mixture, ctx.reduction = mixture.without_tensors(), reduction
        ctx.mark_non_differentiable(*parts)
        return (reduce(losses, reduction, mixture.ignored), *parts)

    @staticmethod
    def backward(ctx, grad, *unused):
        logits, rest, keeper, *tensors = ctx.saved_tensors
        mixture = ctx.mixture.with_tensors(tensors)
        gradient = keeper.__dict__.pop('gradient', None)  # whoever gets it may write into it
        dtype = wide(logits.dtype)
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for: by the plain operations
            log_probs = logits if mixture.normalized else log_softmax(logits)
            losses = terms_of(log_probs, _without_ignored_past(mixture.rows(slice(None), dtype)))[0]
            loss = reduce(losses, ctx.reduction, mixture.ignored)
            gradient = torch.autograd.grad(loss, logits, grad, create_graph=True)[0]
        elif gradient is not None and grad == 1:
            pass
        elif gradient is not None and gradient.dtype == dtype:  # half precision would round twice
            gradient.mul_(grad)
        else:
            gradient = torch.empty_like(logits) if gradient is None else gradient
            minus = _minus_weights(mixture, grad, ctx.reduction, rest.shape)
            for rows in row_slices(logits):
                of_part = [weight[rows] for weight in minus]
                _write_gradient(gradient[rows], logits[rows], mixture.rows(rows, dtype), rest[rows], of_part)
        return gradient, None, None, None, None


def _minus_weights(mixture: Mixture, grad: Tensor, reduction: str, samples: torch.Size):
    """What each sample's hard and soft part weighs in the loss, times -1, ``[N, 1, ...]``."""
    grad = (-grad / counted(samples, reduction, mixture.ignored)).expand(samples)
    if mixture.ignored is not None:
        grad = grad.masked_fill(mixture.ignored, 0)
    return [(grad * weight).unsqueeze(1) for weight in weights(mixture.alpha, mixture.keep_hard)]


def _terms_and_gradient(logits: Tensor, mixture: Mixture, minus, gradient: Tensor, buffers):
    """``terms_of``, and the gradient in its place."""
    probs, log_probs = (buffer[: len(logits)] for buffer in buffers)
    probs = gradient if gradient.dtype == probs.dtype else probs
    softmax_and_log(logits, log_probs, out=probs)
    found = terms_of(log_probs, mixture, spent=True)
    gradient_of_terms(probs, mixture, found[-1], *minus)
    if probs is not gradient:
        gradient.copy_(probs)
    return found


def _write_gradient(gradient: Tensor, logits: Tensor, mixture: Mixture, rest: Tensor, minus) -> None:
    dtype = wide(logits.dtype)
    of_logits = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    if mixture.normalized:
        of_logits.zero_()
    else:
        torch.softmax(logits, 1, dtype=dtype, out=of_logits)
    gradient_of_terms(of_logits, mixture, rest, *minus)
    if of_logits is not gradient:
        gradient.copy_(of_logits)


def gradient_of_terms(gradient, mixture, rest, hard, soft):
    """Of the losses, with respect to the logits, in place of their softmax: each one's share of it, less the target.

    ``hard`` and ``soft``, ``[N, 1, ...]``, are minus the weights of the two parts. Normalised logits have no softmax:
    their gradient is minus the target, in place of zeros.
    """
    labels, past, classes, _, smoothing, ignored, normalized, _ = mixture
    if ignored is not None and classes is not None:  # whose past may hold anything
        past = past.masked_fill(ignored.unsqueeze(1), 0)
        rest = rest.masked_fill(ignored, 0)
    rest = rest.unsqueeze(1)
    each = smoothing / other_classes(gradient)  # what every class gets from the smoothed label
    own = 1 - smoothing - each  # what the label's own gets besides
    ids = labels is not None and not labels.is_floating_point()
    if not normalized:
        share = torch.zeros_like(hard)
        if labels is not None:
            share = share - hard * (own + each * gradient.shape[1] if ids else labels.sum(1, keepdim=True))
        if past is not None:
            left = gradient.shape[1] - past.shape[1]
            share = share - soft * (past.sum(1, keepdim=True) + (rest * left if classes is not None else 0))
        gradient *= share
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
