"""Cost of a method as a ratio to the plain computation, both timed alternately in one run.

A ratio of interleaved steps cancels what else the machine is doing; absolute times would not.
"""

import platform
import statistics
import time
from typing import Callable, Dict, List, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .losses import TopK, pskd_loss
from .pyramid import SelfTeacherPyramid

__all__ = ['Cost', 'PlainPyramid', 'compare', 'hardware', 'loss_suite', 'peak_bytes', 'to_markdown', 'write_section']


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


class PlainPyramid(nn.Module):
    """FRSKD's self-teacher layer by layer as the paper lists them, from torch's modules, for comparison."""

    def __init__(self, in_channels, num_classes, width=2, depth=2):
        super().__init__()
        c = [width * n for n in in_channels]
        levels = range(len(c))
        self.lateral = nn.ModuleList(self.conv1x1(n, c[i]) for i, n in enumerate(in_channels))
        self.lateral2 = nn.ModuleList(self.conv1x1(in_channels[i], c[i]) for i in levels[1:])
        self.up = nn.ModuleList(self.conv1x1(c[i + 1], c[i]) for i in levels[:-1])
        self.down = nn.ModuleList(self.conv1x1(c[i - 1], c[i]) for i in levels[1:])
        self.top_down = nn.ModuleList(self.conv3x3(c[i], depth) for i in levels[:-1])
        self.bottom_up = nn.ModuleList(self.conv3x3(c[i], depth) for i in levels[1:])
        self.top_down_weights = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in levels[:-1])
        self.bottom_up_weights = nn.ParameterList(
            nn.Parameter(torch.ones(3 if i < len(c) - 1 else 2)) for i in levels[1:]
        )
        self.fc = nn.Linear(c[-1], num_classes)

    @staticmethod
    def conv1x1(n_in, n_out):
        return nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

    @staticmethod
    def conv3x3(n, depth):
        layers = []
        for _ in range(depth):
            layers += [nn.Conv2d(n, n, 3, padding=1, groups=n, bias=False), nn.Conv2d(n, n, 1, bias=False)]
            layers += [nn.BatchNorm2d(n), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    @staticmethod
    def fuse(weights, maps):
        weights = F.relu(weights)
        weights = weights / (weights.sum() + 1e-6)
        return sum(w * m for w, m in zip(weights, maps))

    @staticmethod
    def pool(x):
        """Max-pooling 3x3, stride 2, zero padding such that the size is halved and rounded up."""
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = 2 * ((size + 1) // 2 - 1) + 3 - size
            pads += [total // 2, total - total // 2]
        return F.max_pool2d(F.pad(x, pads), 3, 2)

    def forward(self, feats, *, preact=False):
        n = len(feats)
        first = [lateral(F.relu(f)) for lateral, f in zip(self.lateral, feats)]
        second = [None] + [lateral(F.relu(f)) for lateral, f in zip(self.lateral2, feats[1:])]
        p = [None] * (n - 1) + [first[-1]]
        for i in reversed(range(n - 1)):
            coarse = self.up[i](F.interpolate(F.relu(p[i + 1]), size=first[i].shape[2:], mode='nearest'))
            p[i] = self.top_down[i](self.fuse(self.top_down_weights[i], (F.relu(first[i]), coarse)))
        out = [p[0]]
        for i in range(1, n):
            fine = self.down[i - 1](self.pool(F.relu(out[-1])))
            maps = (F.relu(second[i]), F.relu(p[i]), fine) if i < n - 1 else (F.relu(second[i]), fine)
            out.append(self.bottom_up[i - 1](self.fuse(self.bottom_up_weights[i - 1], maps)))
        return out if preact else [F.relu(o) for o in out], self.fc(F.relu(out[-1]).mean((2, 3)))

    def state_of(self, fast: SelfTeacherPyramid) -> dict:
        """This module's state dict with the weights of a :class:`SelfTeacherPyramid` of one pass."""
        state, source = {}, {k.replace('layers.0.', ''): v for k, v in fast.state_dict().items()}
        names = {'from_coarser': 'up', 'from_finer': 'down'}
        for key, value in source.items():
            head, *rest = key.split('.')
            if head != 'laterals':
                state['.'.join([names.get(head, head), *rest])] = value
                continue
            level, rest = int(rest[0]), '.'.join(rest[1:])
            if level == 0:
                state[f'lateral.0.{rest}'] = value
            else:
                first, second = value.chunk(2) if value.dim() else (value, value)
                state[f'lateral.{level}.{rest}'], state[f'lateral2.{level - 1}.{rest}'] = first, second
        return state
