"""A simulated GPU: counts what a training step launches on it, and what the host would wait for.

Within :class:`SimulatedGPU` tensors of the device ``cuda:0`` say that they are on a GPU, and hold their values on the
CPU. Every operation on them is looked at before it runs. What counts as waiting: a value or a size that is read from
the device, and a copy to or from memory that is not pinned. Copies into pinned memory arrive late, once their event is
asked for, so that what reads them earlier finds rubbish.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from typing import Dict, List, Set, Tuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ['SimulatedGPU', 'launches']

GPU = torch.device('cuda', 0)
READS = {'_local_scalar_dense', 'nonzero', 'equal', 'masked_select', 'bincount', 'repeat_interleave', 'isin'}
READS |= {'_unique2', 'unique_dim', 'unique_consecutive'}
INDEXING = {'index', 'index_put', 'index_put_', '_index_put_impl_'}
# Of the list in the documentation of torch.use_deterministic_algorithms; a cumsum of floats as well.
REFUSED = {'put_', 'histc', 'median', 'nll_loss2d_forward', '_adaptive_avg_pool2d_backward', 'bincount', 'kthvalue'}
REFUSED |= {
    'adaptive_max_pool2d_backward',
    'fractional_max_pool2d_backward',
    'max_unpool2d',
    'grid_sampler_2d_backward',
}
REFUSED |= {f'upsample_{mode}_backward' for mode in ('linear1d', 'bilinear2d', 'bicubic2d', 'trilinear3d')}
REFUSED |= {f'{kind}_pad2d_backward' for kind in ('reflection', 'replication')}
NOTHING_TO_DO = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'lift_fresh', 'set_'}
NOTHING_TO_DO |= {'_local_scalar_dense', 'is_same_size', 'record_stream'}


def launches(operation) -> bool:
    """Whether an operation starts a kernel: views and memory that is only reserved do not."""
    views = any(value.alias_info is not None and not value.alias_info.is_write for value in operation._schema.returns)
    return not views and _name(operation) not in NOTHING_TO_DO


def _name(operation) -> str:
    return operation._schema.name.split('::')[1]


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU, to Python; torch itself, which was built without one, sees a meta tensor."""

    values: Tensor
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor):
        layout = dict(strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, **layout, device='meta')
        tensor.values = values
        return tensor

    def __repr__(self):
        return f'OnGPU({self.values})'

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise RuntimeError('a tensor of a simulated GPU is used outside of it')


class Event:
    """``torch.cuda.Event``: what was copied before it arrives when somebody asks whether it did, or waits."""

    under_way: List[Tuple[Tensor, Tensor]] = []
    gpu: 'SimulatedGPU'

    def record(self, stream=None):
        self.copies, self.under_way[:] = self.under_way[:], []

    def query(self) -> bool:
        self.arrive()
        return True

    def synchronize(self):
        if self.copies:
            self.gpu.wait('an event')
        self.arrive()

    def arrive(self):
        for host, values in self.copies:
            host.copy_(values)
        self.copies = []


class SimulatedGPU(TorchDispatchMode):
    """Within it there is a GPU.

    Attributes:
        waits: what the host would have waited for: ``'what, at file:line'`` -> how often.
        kernels: how many kernels would have been launched.
        nondeterministic: operations that ``torch.use_deterministic_algorithms(True)`` refuses on CUDA.
    """

    def __init__(self):
        super().__init__()
        self.waits: Dict[str, int] = Counter()
        self.kernels = 0
        self.nondeterministic: Set[str] = set()
        self._pinned: List[Tensor] = []

    def __enter__(self):
        self._patches = ExitStack()
        Event.gpu = self
        functions = dict(  # a lambda each: torch.compile's tables want different ones
            _lazy_init=lambda: None,
            current_stream=lambda device=None: None,
            manual_seed=lambda seed: None,
            get_rng_state=lambda device=None: torch.zeros(16, dtype=torch.uint8),
            set_rng_state=lambda state, device=None: None,
            mem_get_info=lambda device=None: (2**36, 2**37),
            device=lambda device: ExitStack(),
            Event=Event,
        )
        for name, function in functions.items():
            self._patches.enter_context(patch.object(torch.cuda, name, function))
        for name in ('as_tensor', 'tensor'):
            self._patches.enter_context(patch.object(torch, name, _made_on_host(getattr(torch, name))))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def put(self, value):
        """A tensor, or a module with all its tensors, on the GPU, without counting it."""
        if isinstance(value, Tensor):
            return OnGPU(value.detach().clone()).requires_grad_(value.requires_grad)
        for module in value.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(OnGPU(parameter.detach()), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else OnGPU(buffer)
        return value

    def wait(self, what: str) -> None:
        frame, place = sys._getframe(1), 'elsewhere'
        while frame is not None and place == 'elsewhere':
            if '/plugins/selfkd' in frame.f_code.co_filename:
                place = f'{frame.f_code.co_filename.split("/plugins/")[1]}:{frame.f_lineno}'
            frame = frame.f_back
        self.waits[f'{what}, at {place}'] += 1

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), _name(operation)
        if name in ('copy_', '_to_copy'):
            return self._copy(operation, args, kwargs)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        here = any(isinstance(t, OnGPU) for t in tensors)
        made_here = not tensors and torch.device(kwargs.get('device') or 'cpu').type in ('cuda', 'meta')
        if here:
            self._look(name, operation, args, tensors)
        self.kernels += (here or made_here) and launches(operation)
        pinned = kwargs.pop('pin_memory', False)
        if kwargs.get('device') is not None:
            here = here and torch.device(kwargs['device']).type != 'cpu'
            kwargs['device'] = torch.device('cpu')
        out = operation(*tree_map(_values, args), **tree_map(_values, kwargs))
        if pinned:
            self._pinned.append(out)
        if not (here or made_here):
            return out
        given = {id(t.values): t for t in tensors if isinstance(t, OnGPU)}  # an operation in place returns these
        return tree_map(lambda t: given[id(t)] if id(t) in given else OnGPU(t) if isinstance(t, Tensor) else t, out)

    def _look(self, name: str, operation, args, tensors: List[Tensor]) -> None:
        if name in REFUSED or name == 'cumsum' and tensors[0].is_floating_point():
            self.nondeterministic.add(name)
        if name in READS:
            self.wait(f'the result of {name}')
        if name in INDEXING:
            for index in args[1]:
                if isinstance(index, OnGPU) and index.dtype in (torch.bool, torch.uint8):
                    self.wait('a boolean mask')
                elif isinstance(index, Tensor) and not isinstance(index, OnGPU):
                    self.wait('an index from the host')
            tensors = [args[0], *args[2:3]]
        if any(t.dim() and not isinstance(t, OnGPU) for t in tensors):
            raise RuntimeError(f'{operation}: tensors on the GPU and on the CPU')

    def _copy(self, operation, args, kwargs):
        """Between host and GPU, or from one to the same."""
        source = args[0] if _name(operation) == '_to_copy' else args[1]
        non_blocking = kwargs.pop('non_blocking', args[2] if len(args) > 2 else False)
        of_gpu, pinned = isinstance(source, OnGPU), kwargs.pop('pin_memory', False)
        device = kwargs.pop('device', None)
        if _name(operation) == 'copy_':
            to_gpu = isinstance(args[0], OnGPU)
        else:
            to_gpu = of_gpu if device is None else torch.device(device).type in ('cuda', 'meta')
        host = args[0] if of_gpu else source
        pinned = pinned or any(host.untyped_storage().data_ptr() == p.data_ptr() for p in self._pinned)
        late = of_gpu and not to_gpu and pinned and non_blocking
        if of_gpu != to_gpu and source.dim() + of_gpu and not (pinned and non_blocking):
            self.wait('a copy to the GPU' if to_gpu else 'a copy from the GPU')
        self.kernels += of_gpu and to_gpu
        if late:
            args[0].fill_(-77)
            Event.under_way.append((args[0], _values(source).clone()))
            return args[0]
        if _name(operation) == 'copy_':
            _values(args[0]).copy_(_values(source))
            return args[0]
        out = operation(_values(source), **kwargs)
        return OnGPU(out) if to_gpu else out


def _values(tensor):
    return tensor.values if isinstance(tensor, OnGPU) else tensor


def _made_on_host(make):
    """torch.tensor() and as_tensor() make their tensor on the host, and copy it, out of a dispatch mode's sight."""

    def made(data, *, dtype=None, device=None, **options):
        if isinstance(data, Tensor):
            return data.to(device or data.device, dtype or data.dtype)
        device = _device.CURRENT_DEVICE if device is None else device  # that of set_default_device
        out = make(data, dtype=dtype, device='cpu', **options)
        return (
            out if device is None or torch.device(device).type == 'cpu' else out.reshape(-1).to(device).view(out.shape)
        )

    return made
