"""For code that cannot be edited: the cross-entropy that it computes is softened from outside."""

import copy
import inspect
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode

from selfkd.losses import TopK, mix, soft_cross_entropy
from selfkd.transfer import to_device

from .calls import Hook

__all__ = ['add_terms', 'heard', 'tap', 'unheard']

OPTIONS = ('weight', 'ignore_index', 'reduction', 'label_smoothing')
HEARD = (F.cross_entropy, F.nll_loss)

_methods_own: List[bool] = []  # not empty while a method computes
_adding: List['_Added'] = []  # the taps that add terms, outermost first


@contextmanager
def unheard() -> Iterator[None]:
    """Losses that are computed inside are a method's own: no tap changes them."""
    _methods_own.append(True)
    try:
        yield
    finally:
        _methods_own.pop()


def heard() -> bool:
    """Whether a loss that is computed now may be training's."""
    return not _methods_own and torch.is_grad_enabled()


@contextmanager
def tap(pskd, loss_module: Optional[nn.Module] = None, *, check: bool = True):
    """For code that cannot be edited: softens the cross-entropy that is computed inside.

    ::

        with pskd.tap():
            train_one_epoch(model, nn.CrossEntropyLoss(), optimizer, pskd.batches())

    With a copy, losses of other logits than the model's (an auxiliary head's) stay plain.

    Args:
        loss_module: by default every training call of ``torch.nn.functional.cross_entropy`` is softened
            (``nn.CrossEntropyLoss`` calls it, too), and of ``nll_loss`` on log-probabilities. With several losses, or
            one that is written another way, the module is given here. It is called with (logits, target). One that does
            not call torch's must be a cross-entropy in what it computes, a mean or a value for each sample, with any
            smoothing.
        check: False where less than a batch runs inside.

    Raises:
        RuntimeError: no loss was computed inside.
        ValueError: the module is no cross-entropy.
    """
    before = pskd.count
    with ExitStack() as stack:
        if loss_module is None:
            stack.enter_context(Softened(pskd))
        else:
            named = _Named(pskd)
            stack.callback(loss_module.register_forward_pre_hook(Hook(named.before)).remove)
            # Before the hooks of methods that add terms, whatever was switched on first.
            stack.callback(loss_module.register_forward_hook(Hook(named.after), prepend=True).remove)
            stack.callback(named.close)
        yield
    if check and pskd.count == before:
        raise RuntimeError(
            'PSKD: no training loss was computed inside tap(), so it was plain training: give the loss module, '
            'tap(criterion), or call pskd.loss(logits, target)'
        )


class Softened(TorchFunctionMode):
    """Softens the targets of torch's cross-entropy while gradients are computed."""

    def __init__(self, pskd):
        super().__init__()
        self.pskd, self.outside = pskd, list(_adding)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        pskd = self.pskd
        if function not in HEARD or not pskd.listens():
            return function(*args, **kwargs)
        call = inspect.signature(function).bind(*args, **kwargs).arguments
        if not pskd.is_of_model(call['input'], call['target']):  # an auxiliary head's, say
            return function(*args, **kwargs)
        if function is F.nll_loss and not pskd.sees_log_probs:  # looked at once: on a GPU it waits
            refuse_unless_log_probs(call['input'])
            pskd.sees_log_probs = True
        loss = pskd.loss(call['input'], call['target'], **_options(call))
        for added in reversed(self.outside):  # they do not see this call
            loss = _with_term(added.method, loss, call['input'], call['target'], **_options(call))
        return loss


def _options(call: Dict[str, Any]) -> Dict[str, Any]:
    kept = {name: call[name] for name in OPTIONS if name in call}
    if call.get('size_average') is not None or call.get('reduce') is not None:  # torch's old names
        kept['reduction'] = _reduction.legacy_get_string(call.get('size_average'), call.get('reduce'))
    return kept


@contextmanager
def add_terms(method, loss_module: Optional[nn.Module] = None) -> Iterator[None]:
    """Adds ``method.term(logits, target)`` to the cross-entropy that is computed inside, as ``tap`` softens it.

    Raises:
        RuntimeError: a second cross-entropy in one batch.
    """
    if loss_module is None:
        with _Added(method):
            yield
        return
    hook = loss_module.register_forward_hook(Hook(lambda module, args, output: _with_term(method, output, *args[:2])))
    try:
        yield
    finally:
        hook.remove()


class _Added(TorchFunctionMode):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def __enter__(self):
        _adding.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        _adding.remove(self)
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        loss = function(*args, **(kwargs or {}))  # softened, where a tap of PS-KD is around this one
        if function not in HEARD:
            return loss
        call = inspect.signature(function).bind(*args, **(kwargs or {})).arguments
        return _with_term(self.method, loss, call['input'], call['target'], **_options(call))


def _with_term(method, loss: Tensor, logits: Tensor, target: Tensor, reduction: str = 'mean', **options) -> Tensor:
    if not heard():
        return loss
    if method.used:
        raise RuntimeError(
            f'{method.name}: a second cross-entropy in one batch, and it is not known which of them is of the logits '
            'to teach: name the loss module, as tap(criterion)'
        )
    with unheard():
        term = method.term(logits, target, **(options if method.learns_labels else {}))
        # A sum over the samples is divided later, and with it a sum of the term, which is a mean.
        return loss + (len(target) * term if reduction == 'sum' else term)


class _Named:
    """Hooks of a loss module. What it computes by torch's cross-entropy is softened there, with its options; else its
    value is mixed with the past's, once it has shown that it is a cross-entropy."""

    def __init__(self, pskd):
        self.pskd = pskd
        self._mode: Optional[Softened] = None
        self._count = 0

    def before(self, module: nn.Module, args) -> None:
        self.close()  # of a call that failed
        self._mode, self._count = Softened(self.pskd), self.pskd.count
        self._mode.__enter__()

    def close(self) -> None:
        if self._mode is not None:
            mode, self._mode = self._mode, None
            mode.__exit__(None, None, None)

    def after(self, module: nn.Module, args, output: Tensor) -> Tensor:
        self.close()
        pskd = self.pskd
        if pskd.count > self._count or not pskd.listens() or len(args) < 2 or not pskd.is_of_model(*args[:2]):
            return output
        logits, target = args[:2]
        if module not in pskd.cross_entropies:
            refuse_unless_cross_entropy(module, logits, target)
            pskd.cross_entropies.add(module)
        past = pskd.past_of(logits, target)
        if past is None:
            pskd.log(output)
            return output
        probs = past.probs.dense(logits.shape[1]) if isinstance(past.probs, TopK) else past.probs
        soft, alpha, share = soft_cross_entropy(logits, probs, reduction='none'), pskd.current_alpha, past.alpha(1.0)
        share = share.to(soft) if isinstance(share, Tensor) else share
        if output.dim():
            loss = mix(output, soft, alpha * share, keep_hard=pskd.keep_hard)
        elif past.all_known:
            loss = mix(output, soft.mean(), alpha, keep_hard=pskd.keep_hard)
        else:  # the others learn their labels alone
            known = to_device(past.known.nonzero().flatten(), logits.device)
            hard = module.forward(logits[known], target[known])
            change = mix(hard, soft[known].mean(), alpha, keep_hard=pskd.keep_hard) - hard
            loss = output + len(known) / len(logits) * change
        soft_part = (alpha * share * soft.detach()).mean()
        pskd.log(loss.detach().mean() - soft_part, soft_part, past.entropy(logits.shape[1]))
        return loss


def refuse_unless_log_probs(x: Tensor) -> None:
    sums = x.detach().float().logsumexp(1)
    if not torch.allclose(sums, torch.zeros_like(sums), atol=1e-2):
        raise ValueError(
            'PSKD: F.nll_loss was given values that are no log-probabilities (log_softmax is missing before it?), so '
            'it is not a cross-entropy: use F.cross_entropy on logits'
        )


def refuse_unless_cross_entropy(module: nn.Module, logits: Tensor, target: Tensor) -> None:
    """ValueError: the module is not, by what it computes, ``-sum(q * log_softmax(logits))``, a value for each sample or
    their plain mean, with targets q that are distributions. Only then is it to be mixed with the past's cross-entropy.

    The gradient of such a loss is ``softmax(logits) - q`` at any logits. It is looked at for two, on a copy.
    """
    module, kind = copy.deepcopy(module), type(module).__name__
    shape = logits.shape
    points = [torch.linspace(-2, 2, shape.numel()).view(shape).roll(shift, 1) for shift in (0, 1)]
    found = []
    with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
        for point in points:
            point = point.to(logits.device).requires_grad_()
            value = module.forward(point, target)
            share = 1 if value.dim() else shape.numel() / shape[1]
            (gradient,) = torch.autograd.grad(value.sum(), point)
            found.append(point.detach().softmax(1) - share * gradient)
    targets = found[0]
    sums = targets.sum(1)
    same = torch.allclose(targets, found[1], atol=1e-3)
    if not (same and torch.allclose(sums, torch.ones_like(sums), atol=1e-2) and targets.min() > -1e-2):
        raise ValueError(
            f'PSKD: tap({kind}()): in the first batch of this epoch it is not the cross-entropy of a softmax, an even '
            'mean over samples or a value for each (a binary or focal loss, class weights, a sum?), and is not mixed '
            'with one: use nn.CrossEntropyLoss, which takes weights and any reduction, or pskd.loss(logits, target)'
        )
