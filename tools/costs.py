"""Cost of a method as a ratio to the plain computation, both timed alternately in one run.

A ratio of interleaved steps cancels what else the machine is doing; absolute times would not. What is measured is in
tools/suites. A suite measures its shapes of one size: ``small`` ones for a CPU, ``full`` ones, which people train, for
a GPU, and ``tiny`` ones, the full size's in small numbers, for tests.
"""

import platform
import statistics
import time
from typing import Callable, Dict, List, NamedTuple

import torch

from selfkd.files import replacing

__all__ = ['Cost', 'Table', 'compare', 'hardware', 'peak_bytes', 'to_markdown', 'used_device', 'write_section']


class Cost(NamedTuple):
    """Cost of one way against the plain one: medians over paired repeats."""

    name: str
    milliseconds: float
    time_ratio: float
    memory_ratio: float


class Table(NamedTuple):
    """What a suite found for one shape, and what was computed."""

    title: str
    costs: List[Cost]


def used_device() -> torch.device:
    """The GPU, where there is one: mmengine's and fairseq's trainers choose the same."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def compare(candidates: Dict[str, Callable[[], object]], *, repeats: int = 20) -> List[Cost]:
    """Runs the candidates in turn, ``repeats`` times after a warm-up; the first is the plain one that the others are
    divided by.

    Args:
        candidates: name -> one step, including its backward pass; it leaves no tensors behind that it has made.
        repeats: a single one is a try-out, without a warm-up, and of memory ratios 1.
    """
    warmup = 3 if repeats > 1 else 0
    times: Dict[str, List[float]] = {name: [] for name in candidates}
    for repeat in range(warmup + repeats):
        for name, step in candidates.items():
            _synchronize()
            start = time.perf_counter()
            step()
            _synchronize()
            if repeat >= warmup:
                times[name].append(time.perf_counter() - start)
    peaks = {name: peak_bytes(step) if repeats > 1 else 1 for name, step in candidates.items()}
    plain = next(iter(candidates))
    return [
        Cost(
            name,
            1000 * statistics.median(times[name]),
            statistics.median(a / b for a, b in zip(times[name], times[plain])),
            peaks[name] / peaks[plain],
        )
        for name in candidates
    ]


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


def to_markdown(table: Table) -> str:
    rows = [table.title, '', f'Measured on {hardware()}.', '']
    rows += ['| | ms per step | time ratio | memory ratio |', '| --- | --- | --- | --- |']
    rows += [f'| {c.name} | {c.milliseconds:.4g} | {c.time_ratio:.2f} | {c.memory_ratio:.2f} |' for c in table.costs]
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
