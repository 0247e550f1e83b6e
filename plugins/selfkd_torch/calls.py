"""Which call of a model a loss belongs to, and what the past model gives for the inputs of that call."""

import copy
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import Dataset

from selfkd.checks import is_compiling
from selfkd.past import CopyPast

__all__ = ['Calls', 'Hook', 'copied', 'origin', 'origins', 'recomputes']

# What gives the same values in another form: where one tensor was shaped by two, these are two ways from one origin.
RESHAPES = {
    name + 'Backward'
    for name in ('Alias', 'Clone', 'Permute', 'ReshapeAlias', 'Squeeze', 'T', 'ToCopy', 'Transpose', 'UnsafeView')
}
RESHAPES |= {'UnsqueezeBackward', 'ViewBackward'}

Node = Tuple[Any, int]  # of autograd's graph, and which of its outputs


def origin(tensor: Tensor) -> Node:
    """Where autograd's graph has a tensor's values from."""
    node: Any = tensor.grad_fn
    output = tensor.output_nr
    while type(node).__name__.rstrip('0123456789') in RESHAPES and len(node.next_functions) == 1:
        node, output = node.next_functions[0]
    return node, output


def origins(start: Node, wanted) -> set:
    """Which of the wanted nodes (with or without the number of the output) come first on the ways to a node."""
    found, passed, ways = set(), set(), [start]
    while ways:
        way = ways.pop()
        if way in passed or way[0] is None:
            continue
        passed.add(way)
        hits = {way, way[0]} & set(wanted)
        found |= hits
        if not hits:
            ways.extend(way[0].next_functions)
    return found


def recomputes() -> bool:
    """Whether a module is called within a backward pass: by ``torch.utils.checkpoint``, once more for the same loss."""
    task = getattr(torch._C, '_current_graph_task_id', None)  # of torch 2
    return task is not None and not is_compiling() and task() != -1


class Hook:
    """A hook of a module's calls that copies and pickles of the module have no more: there it does nothing."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __reduce__(self):  # a function of Python's own that takes three arguments and gives None
        return getattr, (nullcontext(), '__exit__')


class _Logits:
    """That a call of the model gives."""

    def __init__(self, past: Optional[Tensor] = None):
        self.past = past
        self.node: Optional[Node] = None  # where they are in autograd's graph
        self.shape: Optional[torch.Size] = None
        self.samples: Optional[Tensor] = None  # a number for each, by its values


class _Call:
    """Of the model, with gradients."""

    def __init__(self, pasts: Sequence[Tensor]):
        self.logits = [_Logits(past) for past in pasts]  # none yet, where there is no past
        self.inside: List[Node] = []  # the logits of losses that it computed itself


class Calls:
    """The calls of the model in the batch under way.

    Args:
        outputs: gives the logits from what the model returns, or a tuple of them; None: they are what it returns.
        model_name: for messages.

    ``past`` is the copy that runs beside each call, once it is ready; None where that is not known yet. While ``looks``
    is set, logits whose samples the loop has put in another order are refused.
    """

    def __init__(self, outputs: Optional[Callable], model_name: str):
        self.outputs, self.model_name = outputs, model_name
        self.past: Optional[CopyPast] = None
        self.looks = False
        self._calls: List[_Call] = []
        self._open: List[Optional[_Call]] = []  # calls that have not returned yet
        self._hooks: List = []

    def watch(self, model: nn.Module) -> None:
        """From now on the calls of this module are noted."""
        self.leave()
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._hooks = [
            inner.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
            inner.register_forward_hook(Hook(self._after), always_call=True),
        ]

    def leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.forget()

    def forget(self) -> None:
        """The calls to come are another batch's."""
        self._calls.clear()
        self._open.clear()

    def knows(self, logits: Tensor) -> bool:
        """Whether logits come from what the model returned, or are of its call under way."""
        return bool(self._open and self._open[-1]) or bool(self._sources(logits))

    def of(self, logits: Tensor) -> _Logits:
        """The logits of a call that these come from.

        Raises:
            RuntimeError: there are none, or more than one.
        """
        if self._open and self._open[-1]:  # a loss within the model; when it returns, it shows whether it is of these
            call = self._open[-1]
            call.inside.append(origin(logits))
            return self._nth(call, len(call.inside) - 1) if call.logits else _Logits()
        found = self._sources(logits)
        if len(found) == 1:
            self._refuse_moved(found[0], logits)
            return found[0]
        if not self._calls:
            raise RuntimeError(
                f'PSKD: the {self.model_name} given as model= was not called before the loss, with gradients (in '
                'checkpoint(..., use_reentrant=True) there are none), so its past copy was not either: give the module '
                'that the loop calls'
            )
        raise RuntimeError(
            f'PSKD: the logits of the loss come from {len(found) or "none"} of the {len(self._calls)} calls of the '
            f'{self.model_name} in this batch, by what outputs= gives of each, so that it is not known what their past '
            "is: give the loss a call's logits (further heads learn with the plain loss), or set outputs="
        )

    def _sources(self, logits: Tensor) -> List[_Logits]:
        given = [given for call in self._calls for given in call.logits]
        if logits.grad_fn is None:  # no graph to go by
            return given
        known: Dict[Node, _Logits] = {one.node: one for one in given if one.node}
        return [known[node] for node in origins(origin(logits), known)]

    def _refuse_moved(self, given: _Logits, logits: Tensor) -> None:
        """By values: an index that keeps all samples where they are is no harm, and arithmetic is not judged."""
        if given.samples is None or given.shape != logits.shape:
            return
        samples = _numbered(logits)
        if ((samples != given.samples) & torch.isin(samples, given.samples)).any():
            raise RuntimeError(
                f'PSKD: between the {self.model_name} and the loss samples were put in another order (logits[index], '
                'flip, cat), and their past predictions were not: give the loss the logits in the order of the call'
            )

    def _nth(self, call: _Call, number: int) -> _Logits:
        """The logits that the model's own loss of this number is of: in the order of ``outputs``."""
        if len(call.logits) == 1:
            return call.logits[0]
        if number >= len(call.logits):
            raise RuntimeError(
                f'PSKD: the {self.model_name} computes a cross-entropy more than the {len(call.logits)} logits that '
                'outputs= gives, and it is not known which past belongs to it: compute its loss outside'
            )
        return call.logits[number]

    def _given(self, output) -> Tuple[Tensor, ...]:
        """The logits. ValueError: there are none."""
        found = output if self.outputs is None else self.outputs(output)
        several = found if self.outputs is not None and isinstance(found, (tuple, list)) else (found,)
        if not all(isinstance(logits, Tensor) for logits in several):
            raise ValueError(
                f'PSKD: the {self.model_name} gives a {type(found).__name__}: say which part of it is the logits, as '
                "outputs=lambda output: output['out']"
            )
        return tuple(several)

    def _before(self, module: nn.Module, args, kwargs) -> None:
        if not torch.is_grad_enabled() or recomputes():
            self._open.append(None)
            return
        pasts: Sequence[Tensor] = ()
        if self.past is not None and self.past.ready:
            # Copies: a model may write into its inputs, and these are the student's.
            args, kwargs = tree_map(copied, (args, kwargs))
            given = self._given(self.past.run(self.past.model, *args, **kwargs))
            pasts = [logits.float().softmax(1) for logits in given]
        self._calls.append(_Call(pasts))
        self._open.append(self._calls[-1])

    def _after(self, module: nn.Module, args, output) -> None:
        call = self._open.pop() if self._open else None
        if call is None:
            return
        if output is None:  # it failed (out of memory, say), and the loop may try again
            self._calls.remove(call)
            return
        try:
            given = self._given(output)
        except Exception:  # it does not give this in evaluation mode, say; a loss of it is refused
            return
        call.logits = call.logits or [_Logits() for _ in given]
        for known, logits in zip(call.logits, given):
            known.node, known.shape = origin(logits), logits.shape
            known.samples = _numbered(logits) if self.looks else None
        for number, inside in enumerate(call.inside):
            node = self._nth(call, number).node
            assert node is not None  # it was just noted
            if not (origins(inside, {node}) or origins(node, {inside})):
                raise RuntimeError(
                    f'PSKD: the {self.model_name} computes a cross-entropy of other logits than outputs= gives, to '
                    'which the past does not belong (an auxiliary head): set outputs=, or compute its loss outside'
                )


def _numbered(logits: Tensor) -> Tensor:
    """A number for each sample by the bits of its logits, in integers: a sum of floats depends on where a row lies."""
    bits = logits.detach().float().flatten(1).contiguous().view(torch.int32).long()
    return (bits * torch.arange(1, 2 * bits.shape[1], 2, device=bits.device)).sum(1)


def copied(value):
    """A tensor's copy, and a copy of an object that has tensors in it (a user's own batch type); for ``tree_map``."""
    return _copied(value, {})


def _copied(value, known: Dict[int, Any]):
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (nn.Module, Dataset, type)):
        return value
    if id(value) not in known:
        known[id(value)] = value
        fields, form = tree_flatten(dict(getattr(value, '__dict__', {})))
        copies = [_copied(field, known) for field in fields]
        if any(new is not old for new, old in zip(copies, fields)):
            known[id(value)] = new = copy.copy(value)
            vars(new).update(tree_unflatten(copies, form))
    return known[id(value)]
