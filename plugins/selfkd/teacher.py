"""A frozen past copy of a model: PS-KD's teacher where a sample is not the same thing twice."""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Dict

import torch
from torch import Tensor, nn

__all__ = ['SnapshotTeacher', 'in_background']

SELF_TEACHER = 'self_teacher'  # the name of FRSKD's sub-module in every toolkit


class SnapshotTeacher:
    """A copy of a model, in evaluation mode and without gradients, that is refreshed when told to.

    It is not a :class:`torch.nn.Module`, so a student or hook that holds one in an attribute does not register it: the
    student's parameters, ``state_dict``, DDP, EMA and optimizer do not see it. It costs the model's weights and
    buffers, and one forward pass per use. Sub-modules named ``self_teacher`` (FRSKD's, for training only) stay out.

    Make it before registering torch hooks on the model: ``copy.deepcopy`` copies hooks along.

    Args:
        model: the model to copy, unwrapped (not the DDP module).

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> teacher = SnapshotTeacher(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1)
        >>> x = torch.ones(1, 2)
        >>> torch.allclose(teacher(x) + 2, model(x))
        True
        >>> teacher.update(model)
        >>> torch.equal(teacher(x), model(x)), teacher(x).requires_grad
        (True, False)
    """

    def __init__(self, model: nn.Module):
        # torch's weight_norm keeps the computed weight as a plain, non-leaf attribute, which deepcopy refuses:
        # give the copy a detached one, the module recomputes it in its next forward pass.
        memo = {
            id(value): value.detach().clone()
            for module in model.modules()
            for value in vars(module).values()
            if isinstance(value, Tensor) and not value.is_leaf
        }
        for module in model.modules():
            memo.update({id(child): nn.Identity() for name, child in module.named_children() if name == SELF_TEACHER})
        self.model = copy.deepcopy(model, memo).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes over the model's present parameters and buffers.

        Raises:
            ValueError: the model's tensors differ in number or shape from those copied.
        """
        ours, theirs = _tensors(self.model), _tensors(model)
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            raise ValueError('model: is not the model that this teacher was made from (other tensors or shapes)')
        for mine, other in zip(ours, theirs):
            mine.copy_(other)

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        """The copy's forward pass."""
        return self.model(*args, **kwargs)

    def state_dict(self) -> Dict[str, Tensor]:
        """The copy's parameters and buffers, to be saved where the model's own weights are already newer."""
        return self.model.state_dict()

    def load_state_dict(self, state: Dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


def _tensors(model: nn.Module):
    named = [*model.named_parameters(), *model.named_buffers()]
    return [tensor for name, tensor in named if SELF_TEACHER not in name.split('.')]


def in_background(function: Callable, *args) -> Future:
    """Starts a call in a thread of its own: on CPUs, the copy's work beside what the student does on one thread.

    The thread ends with the call. One that stayed would slow down OpenMP's in the whole process.
    """
    thread = ThreadPoolExecutor(1)
    call = thread.submit(function, *args)
    thread.shutdown(wait=False)
    return call
