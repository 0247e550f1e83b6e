"""PS-KD straight from hidden states and the output layer's weight: logits of all tokens never exist."""

from typing import Any, Dict, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_alpha, check_labels, check_reduction, check_top_k, tracing, wide
from ..topk import TopK, draw_top_k
from ._common import softmax_and_log, times, weights
from ._mixed_nll import Mixture, gradient_of_terms, terms_of
from .pskd import PSKDParts, pskd_loss

__all__ = ['linear_pskd_loss']

LOGITS_AT_ONCE = {'cpu': 2**23}  # the products want many, the cache few; elsewhere enough to keep the device busy


def linear_pskd_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    past: Optional[TopK],
    alpha: Union[float, Tensor],
    *,
    bias: Optional[Tensor] = None,
    ignore_index: int = -100,
    reduction: str = 'mean',
    keep_hard: bool = False,
    draw: Optional[Tuple[int, Tensor]] = None,
    return_parts: bool = False,
):
    r"""``pskd_loss`` of ``hidden @ weight.T + bias``, for vocabularies whose logits would fill the memory.

    The logits of a few tokens at a time are made, their loss and gradients taken, and the memory used again, as
    Liger-Kernel's fused linear cross-entropy does (https://arxiv.org/abs/2410.10989). It takes as many matrix products
    as with logits: three.

    Args:
        hidden: ``[N, D]``, any floating dtype.
        weight: of the output layer, ``[V, D]``, in the dtype of ``hidden``.
        labels: class ids ``[N]``.
        past: past predictions of the tokens, or None with ``alpha=0``; a constant.
        alpha: in [0, 1], a number, or a tensor ``[N]`` with one per token: 0 for tokens that have no past yet.
        bias: of the output layer, ``[V]``.
        ignore_index: class ids of this value contribute nothing, and are not counted by ``'mean'``.
        reduction: ``'mean'`` or ``'sum'``.
        keep_hard: the label's term keeps its whole weight, 1 instead of ``1 - alpha``.
        draw: (k, uniform): also draw k classes of each new prediction with the random numbers ``uniform`` ``[N]``, as
            [`draw_top_k`][selfkd.topk.draw_top_k] does. Nobody has the logits to do so afterwards.
        return_parts: also return ``PSKDParts``.

    Returns:
        the loss, or a tuple of it, the parts (with ``return_parts``), and (with ``draw``) [`TopK`][selfkd.topk.TopK] of
        the new predictions.

    Raises:
        ValueError: as ``pskd_loss``, and shapes that do not fit the output layer.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
        >>> labels, past = torch.arange(6), TopK(torch.full((6, 1), 0.7), torch.arange(6)[:, None])
        >>> loss = linear_pskd_loss(hidden, weight, labels, past, 0.3)
        >>> torch.allclose(loss, pskd_loss(hidden @ weight.T, labels, past, 0.3, ignore_index=-100))
        True
    """
    check_reduction(reduction, ('mean', 'sum'))
    _check_layer(hidden, weight, bias)
    of_logits = hidden.new_empty(()).expand(len(hidden), len(weight))  # their shape, dtype and device, and no memory
    alpha = check_alpha(alpha, of_logits)
    ignored = labels == ignore_index
    labels = check_labels(labels.masked_fill(ignored, 0), of_logits)
    if past is not None:
        check_top_k('past', *past, of_logits, ignored)
    elif isinstance(alpha, Tensor) or alpha != 0:
        raise ValueError(f'past: None is allowed with alpha=0 only, got alpha={alpha}')
    if tracing():
        logits = F.linear(hidden, weight, bias)
        labels = labels.masked_fill(ignored, ignore_index)
        options: Dict[str, Any] = dict(ignore_index=ignore_index, reduction=reduction, keep_hard=keep_hard)
        loss, parts = pskd_loss(logits, labels, past, alpha, return_parts=True, **options)
        drawn = draw_top_k(logits, *draw) if draw else None
    else:
        values, classes = past or (None, None)
        mixture = Mixture(labels, values, classes, alpha, ignored=ignored, keep_hard=keep_hard)
        needs_grad = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        settings = (mixture, reduction == 'mean', needs_grad, *(draw or (0, None)))
        loss, hard, soft, nll, *new = _LinearPSKD.apply(hidden, weight, bias, *settings)
        parts, drawn = PSKDParts(hard, soft, nll), TopK(*new)
    returned = (loss, *[parts] * return_parts, *[drawn] * bool(draw))
    return returned if len(returned) > 1 else loss


def _check_layer(hidden: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
    shapes = (hidden.dim(), weight.dim(), hidden.shape[-1:], bias is None or bias.shape == weight.shape[:1])
    if shapes != (2, 2, weight.shape[-1:], True):
        raise ValueError(
            f'hidden, weight, bias: must be [N, D], [V, D] and [V], got {tuple(hidden.shape)}, {tuple(weight.shape)} '
            f'and {bias if bias is None else tuple(bias.shape)}'
        )


class _LinearPSKD(torch.autograd.Function):
    """The gradients are taken in the forward pass, where a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, mixture, mean, needs_grad, k, uniform):
        sums, gradients, drawn = _by_chunks(hidden, weight, bias, mixture, mean, needs_grad, k, uniform)
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*gradients)
        loss, *parts = (value.clone() for value in sums)
        ctx.mark_non_differentiable(*parts, *drawn)
        return (loss, *parts, *drawn)

    @staticmethod
    def backward(ctx, grad, *unused):
        if torch.is_grad_enabled():
            raise RuntimeError('linear_pskd_loss: has no second derivative: use pskd_loss, which has one')
        scaled = (g if g is None else (g * grad.to(g.dtype)).to(ctx.dtype) for g in ctx.saved_tensors)
        return (*scaled, *[None] * 5)


def _by_chunks(hidden, weight, bias, mixture, mean, needs_grad, k, uniform):
    """The loss and its parts as one tensor, the gradients that are needed (float16's are still wide), and what was
    drawn: values and classes."""
    dtype = wide(hidden.dtype)
    valid = (~mixture.ignored).to(dtype)
    # float16 neither holds small gradients nor the scale that a GradScaler multiplies them with.
    keeps = hidden.dtype != torch.float16
    count = valid.sum().clamp(min=1) if mean else valid.new_ones(())
    scale = valid / count
    factor = scale if keeps else valid  # the mean is taken at the end
    gradients = [
        torch.zeros(x.shape, dtype=x.dtype if x is hidden and keeps else dtype, device=x.device) if needed else None
        for x, needed in zip((hidden, weight, bias), needs_grad)
    ]
    sums, drawn = hidden.new_zeros(4, dtype=dtype), []
    tokens = max(16, LOGITS_AT_ONCE.get(hidden.device.type, 2**25) // len(weight))
    for start in range(0, len(hidden), tokens):
        rows = slice(start, start + tokens)
        part = mixture.rows(rows, dtype)
        log_probs = F.linear(hidden[rows], weight, bias).to(dtype)  # still logits
        probs, log_probs = softmax_and_log(log_probs, log_out=log_probs)
        if k:
            drawn.append(draw_top_k(log_probs, k, uniform[rows]))
        loss, hard, soft, nll, rest = terms_of(log_probs, part, spent=True)
        shares = weights(part.alpha, part.keep_hard)
        terms = (loss, times(shares[0], hard), times(shares[1], soft), nll)
        sums += torch.stack([(term * scale[rows]).sum() for term in terms])
        if any(needs_grad):
            gradient_of_terms(probs, part, rest, *((-share * factor[rows]).unsqueeze(1) for share in shares))
            if gradients[2] is not None:
                gradients[2] += probs.sum(0)
            of_logits = probs.to(hidden.dtype)
            del probs, log_probs  # their memory is needed now
            _add_gradients(gradients, of_logits, hidden, weight, rows)
            del of_logits
    gradients = [g if g is None else g.to(hidden.dtype) if keeps else g.div_(count) for g in gradients]
    kept = [torch.cat(parts) for parts in zip(*drawn)]
    return sums, gradients, kept or [sums.new_empty(0, k), mixture.labels.new_empty(0, k)]


def _add_gradients(gradients, of_logits: Tensor, hidden: Tensor, weight: Tensor, rows: slice) -> None:
    of_hidden, of_weight, _ = gradients
    if of_hidden is not None:
        if of_hidden.dtype == hidden.dtype:
            torch.matmul(of_logits, weight, out=of_hidden[rows])
        else:
            of_hidden[rows] = (of_logits @ weight).to(of_hidden.dtype)
    if of_weight is not None and of_weight.dtype == hidden.dtype:
        of_weight.addmm_(of_logits.t(), hidden[rows])
    elif of_weight is not None:
        of_weight += of_logits.t() @ hidden[rows]
