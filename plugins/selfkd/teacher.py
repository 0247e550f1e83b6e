"""A frozen past copy of a model: PS-KD's teacher where a sample is not the same thing twice."""

import copy
import random
import sys
import weakref
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from torch import Tensor, nn

from .checks import one_of
from .seeds import step_seed

__all__ = ['HALF', 'MODES', 'SnapshotTeacher', 'as_before', 'random_state', 'random_states', 'unwrap']

SELF_TEACHER = 'self_teacher'  # the name of FRSKD's sub-module in every toolkit

MODES = ('train', 'eval')
HALF = (torch.float16, torch.bfloat16)
WRAPPERS = {'DistributedDataParallel', 'FullyShardedDataParallel', 'DataParallel'}


class SnapshotTeacher:
    """A copy of a model, that is called without gradients and refreshed when told to.

    It is not a ``torch.nn.Module``, so a student or hook that holds one in an attribute does not register it: the
    student's parameters, ``state_dict``, DDP, EMA and optimizer do not see it. It costs the model's weights and
    buffers, and one forward pass per use. Sub-modules named ``self_teacher`` (FRSKD's, for training only) stay out.

    Make it before registering torch hooks on the model: ``copy.deepcopy`` copies hooks along.

    Args:
        model: the model to copy, unwrapped (not the DDP module).
        mode: ``'train'`` runs the copy in the mode that the student is in at the call: dropout and other noise drawn
            anew, batch norm by the batch's statistics (the copy's running ones stay as they are); what the student
            keeps in evaluation mode (frozen batch norms) stays so. That is PS-KD's past prediction: what the network
            gave while it trained. ``'eval'`` runs it in evaluation mode, without noise: sharper on the samples that it
            has learnt.
        copy_model: False takes the model itself, for a copy that somebody else keeps (an average of the weights).

    The noise comes from random states of its own, given by the step (``begin_step``), the process's rank and the
    number of the call: torch's own are left as they were, NumPy's and Python's as well, so that the student draws what
    it would draw without a teacher, and a resumed run draws what the run it resumes would have drawn.

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

    def __init__(self, model: nn.Module, *, mode: str = 'train', copy_model: bool = True):
        one_of('SnapshotTeacher', MODES, mode=mode)
        self.mode = mode
        self.wide: List[Tensor] = []
        self.model = _copy_of(model) if copy_model else model
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.track_running_stats = False  # in training mode: normalise by the batch, without keeping account
        self.follow(model)
        self.begin_step(0)

    def follow(self, model: nn.Module) -> None:
        """Names the student: at each call the copy's modules take the modes of its modules, training or evaluation."""
        self._student = weakref.ref(model)

    def _take_modes(self) -> None:
        student = self._student()
        if self.mode == 'eval':
            self.model.eval()
        elif student is not None and student is not self.model:
            training = {name: module.training for name, module in student.named_modules()}
            for name, module in self.model.named_modules():
                module.training = training.get(name, module.training)

    def begin_step(self, step: int) -> None:
        """The calls to come are those of training step ``step``: what noise they draw follows from it."""
        self._step, self._calls = step, 0

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
        self.follow(model)

    @torch.no_grad()
    def average(self, model: nn.Module, decay: float) -> None:
        """Moves the copy's parameters towards the model's, ``decay * own + (1 - decay) * the model's``; takes over its
        buffers. Averages of half-precision parameters are kept in float32 as well (``wide``): a step would be lost
        in their rounding."""
        own_parameters = list(self.model.parameters())
        if not self.wide:
            self.wide = [p.float() if p.dtype in HALF else p for p in own_parameters]
        for mine, average, other in zip(own_parameters, self.wide, _parameters(model)):
            average.lerp_(other.detach().to(average.dtype), 1 - decay)
            if average is not mine:
                mine.copy_(average)
        for own, other in zip(self.model.buffers(), _buffers(model)):
            own.copy_(other)

    def __call__(self, *args, **kwargs):
        """The copy's forward pass."""
        return self.run(self.model, *args, **kwargs)

    @torch.no_grad()
    def run(self, function: Callable, *args, **kwargs):
        """Calls a method of the copy, as ``teacher.run(teacher.model.extract_feat, images)``, with its own noise."""
        seed = step_seed(self._step, self._calls)
        self._calls += 1
        self._take_modes()
        with random_state(seed, _tensors(self.model)[0].device):
            return function(*args, **kwargs)

    def state_dict(self) -> Dict[str, Tensor]:
        """The copy's parameters and buffers, to be saved where the model's own weights are already newer."""
        return self.model.state_dict()

    def load_state_dict(self, state: Dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, FSDP, DataParallel and torch.compile."""
    while True:
        wrapped = {kind.__name__ for kind in type(model).__mro__} & WRAPPERS
        inner = getattr(model, '_orig_mod', model.module if wrapped else None)
        if inner is None:
            return model
        model = inner


def _copy_of(model: nn.Module) -> nn.Module:
    # torch's weight_norm keeps the computed weight as a plain, non-leaf attribute, which deepcopy refuses:
    # give the copy a detached one, the module recomputes it in its next forward pass.
    memo: Dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    for module in model.modules():
        memo.update({id(child): nn.Identity() for name, child in module.named_children() if name == SELF_TEACHER})
    copied = copy.deepcopy(model, memo)
    # Only gradients are dropped. Without requires_grad, F.linear takes another way where its input is not contiguous:
    # on a CPU one four times slower, and rounded differently from the student's.
    for parameter in copied.parameters():
        parameter.grad = None
    copies = dict(copied.named_modules())
    for name, module in model.named_modules():
        forward = vars(module).get('forward')
        if forward is not None and name in copies and vars(copies[name]).get('forward') is forward:
            raise ValueError(
                f'{name or type(model).__name__}.forward was set on the module itself (torch.compile(model.forward), a '
                'decorator), and a copy of the module would call it too, which is the student: compile or wrap the '
                "module, as torch.compile(model), or use teacher='bank'"
            )
    return copied


def _tensors(model: nn.Module) -> List[Tensor]:
    return _parameters(model) + _buffers(model)


def _parameters(model: nn.Module) -> List[Tensor]:
    return [tensor for name, tensor in model.named_parameters() if SELF_TEACHER not in name.split('.')]


def _buffers(model: nn.Module) -> List[Tensor]:
    return [tensor for name, tensor in model.named_buffers() if SELF_TEACHER not in name.split('.')]


def random_states(device: torch.device) -> Tuple[Any, ...]:
    """The present ones: of torch on the CPU and on ``device``, of NumPy and of Python.

    Some models draw from NumPy which layers they drop, and some draw in evaluation mode, too.
    """
    numpy = sys.modules.get('numpy')  # a model that draws from it has imported it
    of_device = torch.cuda.get_rng_state(device) if device.type == 'cuda' else None
    return torch.get_rng_state(), of_device, numpy and numpy.random.get_state(), random.getstate()


def _set(states: Tuple[Any, ...], device: torch.device) -> None:
    of_cpu, of_device, of_numpy, of_python = states
    torch.set_rng_state(of_cpu)
    if of_device is not None:
        torch.cuda.set_rng_state(of_device, device)
    if of_numpy is not None:
        sys.modules['numpy'].random.set_state(of_numpy)
    random.setstate(of_python)


@contextmanager
def as_before(states: Tuple[Any, ...], device: torch.device) -> Iterator[None]:
    """Runs its body in [`random_states`][] of before; afterwards they are what they were."""
    present = random_states(device)
    _set(states, device)
    try:
        yield
    finally:
        _set(present, device)


@contextmanager
def random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Runs its body in random states from a seed; afterwards they are what they were."""
    with as_before(random_states(device), device):
        torch.default_generator.manual_seed(seed)
        if device.type == 'cuda':
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        if 'numpy' in sys.modules:
            sys.modules['numpy'].random.seed(seed % 2**32)
        yield
