"""PS-KD of causal language models whose logits never exist."""

from contextlib import contextmanager
from typing import Any, Iterator, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from selfkd_torch import TokenPSKD
from selfkd_torch.calls import Hook
from selfkd_torch.tap import unheard

__all__ = ['FusedPSKD', 'output_layer']

WAY_OUT = 'set pskd_fused=False'


def output_layer(model: nn.Module) -> nn.Linear:
    """Of a causal language model.

    Raises:
        ValueError: the model's loss is not the cross-entropy of what one linear layer gives.
    """
    inner: Any = model.get_base_model() if hasattr(model, 'get_base_model') else model  # PEFT's
    kind = type(inner).__name__
    if getattr(inner, 'loss_function', None) is not ForCausalLMLoss or inner.config.is_encoder_decoder:
        raise ValueError(f'PSKD: pskd_fused is for causal language models, and {kind} has another loss: {WAY_OUT}')
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f'PSKD: pskd_fused needs an output layer that is an nn.Linear, and that of {kind} is a '
            f'{type(head).__name__} (an adapter on it?): {WAY_OUT}'
        )
    if getattr(inner.config, 'output_router_logits', False):
        raise ValueError(f'PSKD: pskd_fused does not have the loss of the experts of {kind}: {WAY_OUT}')
    return head


class FusedPSKD(TokenPSKD):
    """PS-KD, and the ``compute_loss_func`` of a Trainer.

    In a training step the output layer is called with the first token of each sample. From what it was to be called
    with, the loss is computed a few tokens at a time.

    Args:
        head: the output layer.
        dtype: of its products; None: that of the hidden states.
    """

    def __init__(self, *args, head: nn.Linear, dtype: Optional[torch.dtype], **options):
        super().__init__(*args, **options)
        self.head, self.dtype = head, dtype
        self._in_step = self._compared = False
        self._hidden: Optional[Tensor] = None  # of all tokens, since the last loss
        self._logits: Optional[Tensor] = None  # of the first ones, as the output layer gives them

    @contextmanager
    def tap(self) -> Iterator[None]:  # type: ignore[override]  # there is no cross-entropy to hear
        hooks = [
            self.head.register_forward_pre_hook(Hook(self._shorten)),
            self.head.register_forward_hook(Hook(self._note)),
        ]
        self._in_step = True
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._in_step, self._hidden, self._logits = False, None, None

    def _shorten(self, module: nn.Module, args):
        if not torch.is_grad_enabled():
            return None
        self._hidden = args[0]
        return (args[0][:, :1],)

    def _note(self, module: nn.Module, args, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._logits = output.detach()

    def loss_of(self, outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        """Of labels ``[B, T]``, each of which is to be predicted at the position before it; plain outside a training
        step, where there are logits."""
        target = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
        reduction = 'mean' if num_items_in_batch is None else 'sum'
        if not (self._in_step and torch.is_grad_enabled()):
            loss = F.cross_entropy(outputs['logits'].flatten(0, 1).float(), target, reduction=reduction)
            return loss if num_items_in_batch is None else loss / num_items_in_batch
        hidden = self._hidden
        if hidden is None or hidden.shape[:2] != labels.shape:
            raise RuntimeError(
                'PSKD: pskd_fused computes the loss of what the output layer is called with for each token, which was '
                f'{"nothing" if hidden is None else tuple(hidden.shape)} for labels {tuple(labels.shape)}: {WAY_OUT}'
            )
        assert self._logits is not None  # the layer was called
        if not self._compared and not torch.equal(outputs['logits'].float(), self._logits.float()):  # on a GPU it waits
            raise ValueError(
                'PSKD: the model changes what its output layer gives (soft-capping, a scale), which pskd_fused does '
                f'not: {WAY_OUT}'
            )
        self._compared = True
        outputs['logits'] = self._hidden = None  # nobody takes one token's for all
        dtype = self.dtype or hidden.dtype
        weight, bias = (part if part is None else part.to(dtype) for part in (self.head.weight, self.head.bias))
        with unheard():
            loss = self.linear_loss(hidden.flatten(0, 1).to(dtype), weight, target, bias=bias, reduction=reduction)
        return loss if num_items_in_batch is None else loss / num_items_in_batch
