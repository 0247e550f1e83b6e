"""Cost of a method as a ratio to the plain computation, both timed alternately in one run.

A ratio of interleaved steps cancels what else the machine is doing; absolute times would not. What is measured is in
tools/suites. A suite measures its shapes of one size: ``small`` ones for a CPU, ``full`` ones, which people train, for
a GPU, and ``tiny`` ones, the full size's in small numbers, for tests.
"""

import platform
import statistics
import time
from typing import Callable, Dict, List, NamedTuple, Tuple, Union

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from selfkd.files import replacing

__all__ = [
    'Cost',
    'Counts',
    'Table',
    'compare',
    'hardware',
    'held_bytes',
    'peak_bytes',
    'to_markdown',
    'used_device',
    'write_section',
]


class Cost(NamedTuple):
    """Cost of one way against the plain one. Ratios are medians over paired repeats; the plain one's time is a median,
    and the others' are that times their ratio, so that a busy machine does not make the two contradict each other."""

    name: str
    milliseconds: float
    time_ratio: float
    memory_ratio: float


class Table(NamedTuple):
    """What a suite found for one shape, and what was computed; ``tokens``: of a step, in the language suites."""

    title: str
    costs: List[Cost]
    tokens: int = 0


class Counts(NamedTuple):
    """What a suite counted, which no clock and no machine changes."""

    title: str
    columns: Tuple[str, ...]
    rows: List[Tuple[str, ...]]


def used_device() -> torch.device:
    """The GPU, where there is one: mmengine's and fairseq's trainers choose the same."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def compare(
    candidates: Dict[str, Callable[[], object]],
    *,
    repeats: int = 20,
    burst: int = 5 if torch.cuda.is_available() else 1,
) -> List[Cost]:
    """Runs the candidates in turn, ``repeats`` times after a warm-up; the first is the plain one that the others are
    divided by.

    Args:
        candidates: name -> one step, including its backward pass; it leaves no tensors behind that it has made.
        repeats: a single one is a try-out, without a warm-up, and of memory ratios 1.
        burst: steps that are timed together. If a GPU were waited for after each, a step that waits by itself would
            look as fast as one that does not.
    """
    warmup = 3 if repeats > 1 else 0
    times: Dict[str, List[float]] = {name: [] for name in candidates}
    for repeat in range(warmup + repeats):
        for name, step in candidates.items():
            _synchronize()
            start = time.perf_counter()
            for _ in range(burst):
                step()
            _synchronize()
            if repeat >= warmup:
                times[name].append((time.perf_counter() - start) / burst)
    peaks = {name: peak_bytes(step) if repeats > 1 else 1 for name, step in candidates.items()}
    plain = next(iter(candidates))
    ratios = {name: statistics.median(a / b for a, b in zip(times[name], times[plain])) for name in candidates}
    milliseconds = 1000 * statistics.median(times[plain])
    return [Cost(name, milliseconds * ratios[name], ratios[name], peaks[name] / peaks[plain]) for name in candidates]


def peak_bytes(step: Callable[[], object]) -> int:
    """The most memory that tensors made during a step hold at a time."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class _Held(TorchDispatchMode):
    """Notes what memory the tensors that are made in it hold, on the meta device as well."""

    def __init__(self):
        super().__init__()
        self.peak, self._storages = 0, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        out = operation(*args, **(kwargs or {}))
        for made in tree_flatten(out)[0]:
            storage = made.untyped_storage() if isinstance(made, Tensor) else None
            if storage is not None and storage._cdata not in given:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return out


def held_bytes(step: Callable[[], object]) -> int:
    """``peak_bytes`` of the tensors that operations give, without running on the device that they name."""
    with _Held() as held:
        step()
    return held.peak


def hardware() -> str:
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return f'{torch.cuda.get_device_name()}, torch {torch.__version__}'
    model = platform.processor() or platform.machine()
    try:
        with open('/proc/cpuinfo') as lines:
            model = next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        pass
    return f'{model}, {torch.get_num_threads()} threads, torch {torch.__version__}'


def to_markdown(table: Union[Table, Counts]) -> str:
    if isinstance(table, Counts):
        lines = [table.columns, ['---'] * len(table.columns), *table.rows]
        return '\n'.join([table.title, '', *(f'| {" | ".join(line)} |' for line in lines)])
    rows = [table.title, '', f'Measured on {hardware()}.', '']
    speed = ' tokens per second |' if table.tokens else ''
    rows += [f'| | ms per step | time ratio | memory ratio |{speed}', f'| {"--- | " * (5 if speed else 4)}'.rstrip()]
    for name, milliseconds, time_ratio, memory_ratio in table.costs:
        tokens = f' {1000 * table.tokens / milliseconds:.3g} |' if speed else ''
        rows.append(f'| {name} | {milliseconds:.4g} | {time_ratio:.2f} | {memory_ratio:.2f} |{tokens}')
    return '\n'.join(rows)


def write_section(path: str, name: str, text: str) -> None:
    """Replaces what stands between ``<!-- NAME -->`` and ``<!-- end NAME -->`` in a Markdown file."""
    begin, end = f'<!-- {name} -->', f'<!-- end {name} -->'
    with open(path) as file:
        page = file.read()
    if begin not in page or end not in page:
        raise ValueError(f'{path}: has no section {begin} ... {end}')
    head, rest = page.split(begin, 1)
    with replacing(path) as beside:
        beside.write_text(f'{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}')


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
