"""Cost of a method as a ratio to the plain computation, both timed alternately in one run.

A ratio of interleaved steps cancels what else the machine is doing; absolute times would not.
"""

import platform
import statistics
import time
from typing import Callable, Dict, List, NamedTuple

import torch
import torch.nn.functional as F

from .losses import TopK, pskd_loss

__all__ = ['Cost', 'compare', 'hardware', 'loss_suite', 'peak_bytes', 'to_markdown', 'write_section']


class Cost(NamedTuple):
    """Cost of one way against the plain one: medians over paired repeats."""

    name: str
    milliseconds: float
    time_ratio: float
    memory_ratio: float


def compare(
    candidates: Dict[str, Callable[[], object]], *, repeats: int = 20, warmup: int = 3, memory: bool = True
) -> List[Cost]:
    """Runs the candidates in turn, ``repeats`` times; the first is the plain one that the others are divided by.

    Args:
        candidates: name -> one step, including its backward pass; it leaves no tensors behind that it has made.
        memory: also compare the most memory a step holds at a time.
    """
    times = {name: [] for name in candidates}
    for repeat in range(warmup + repeats):
        for name, step in candidates.items():
            _synchronize()
            start = time.perf_counter()
            step()
            _synchronize()
            if repeat >= warmup:
                times[name].append(time.perf_counter() - start)
    peaks = {name: peak_bytes(step) if memory else 1 for name, step in candidates.items()}
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


def loss_suite(device: str = 'cpu') -> List[Cost]:
    """PS-KD's loss against ``torch.nn.functional.cross_entropy``, 1024 x 32000 logits, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1024, 32000, generator=generator).to(device).requires_grad_()
    labels = torch.randint(32000, (1024,), generator=generator).to(device)
    past = torch.randn(1024, 32000, generator=generator).softmax(1).to(device)
    top = TopK(*past.topk(8, 1))

    def step(loss):
        def run():
            loss().backward()
            logits.grad = None

        return run

    def composed():  # the target built, then torch's own loss
        target = 0.6 * F.one_hot(labels, 32000) + 0.4 * past
        return F.cross_entropy(logits, target)

    def identity():  # how research scripts do it: the one-hot label is a row of an identity matrix
        target = 0.6 * torch.eye(32000, device=device)[labels] + 0.4 * past
        return torch.mean(torch.sum(-target * F.log_softmax(logits, dim=1), dim=1))

    return compare(
        {
            'F.cross_entropy': step(lambda: F.cross_entropy(logits, labels)),
            'pskd_loss, dense past': step(lambda: pskd_loss(logits, labels, past, 0.4)),
            'pskd_loss, top-8 past': step(lambda: pskd_loss(logits, labels, top, 0.4)),
            'target built, then F.cross_entropy': step(composed),
            'identity matrix, sum of products': step(identity),
        }
    )


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


def to_markdown(costs: List[Cost]) -> str:
    rows = ['| | ms per step | time ratio | memory ratio |', '| --- | --- | --- | --- |']
    rows += [f'| {c.name} | {c.milliseconds:.1f} | {c.time_ratio:.2f} | {c.memory_ratio:.2f} |' for c in costs]
    return '\n'.join(rows)


def write_section(path: str, name: str, text: str) -> None:
    """Replaces what stands between ``<!-- NAME -->`` and ``<!-- end NAME -->`` in a Markdown file."""
    begin, end = f'<!-- {name} -->', f'<!-- end {name} -->'
    with open(path) as file:
        page = file.read()
    if begin not in page or end not in page:
        raise ValueError(f'{path}: has no section {begin} ... {end}')
    head, rest = page.split(begin, 1)
    with open(path, 'w') as file:
        file.write(head + begin + '\n' + text + '\n' + end + rest.split(end, 1)[1])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
