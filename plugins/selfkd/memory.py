"""How much memory a table may take: what is free on its device, and how many processes make one there."""

import os
from pathlib import Path
from typing import Iterator, List, Optional

import torch
import torch.distributed as dist

__all__ = ['free_memory', 'processes_sharing']


def free_memory(device: torch.device) -> Optional[int]:
    """Bytes that could still be taken, page cache included; None: not known.

    On the CPU that is what the system has, or what the control groups of this process (a container, a job of a cluster)
    leave of their limits, if that is less.
    """
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    if device.type != 'cpu':
        return None
    return min([*_of_system(), *left_by_cgroups()], default=None)


def processes_sharing(device: torch.device) -> int:
    """How many processes of this training make their tables in the same memory."""
    if device.type != 'cpu' or not (dist.is_available() and dist.is_initialized()):
        return 1
    if os.environ.get('LOCAL_WORLD_SIZE', '').isdecimal():  # torchrun's
        return int(os.environ['LOCAL_WORLD_SIZE'])
    # Other launchers do not say it. There is one process for each GPU; without any, all are taken to be on one machine.
    return min(dist.get_world_size(), torch.cuda.device_count() or dist.get_world_size())


def _of_system() -> Iterator[int]:
    for line in _lines(Path('/proc/meminfo')):
        if line.startswith('MemAvailable'):
            yield int(line.split()[1]) * 1024


def left_by_cgroups(root: Path = Path('/sys/fs/cgroup'), of_process: Path = Path('/proc/self/cgroup')) -> Iterator[int]:
    """What each control group that limits this process leaves, in bytes; those above its own, too (v2 and v1)."""
    for line in _lines(of_process):
        _, controllers, group = line.split(':', 2)
        if controllers == '':  # v2
            top, limit, used, cache = root, 'memory.max', 'memory.current', ('inactive_file', 'active_file')
        elif 'memory' in controllers.split(','):
            top, limit, used = root / 'memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes'
            cache = ('total_inactive_file', 'total_active_file')
        else:
            continue
        # A container sees its group as the root, and may be told the name that the group has outside.
        names = Path(group.lstrip('/')).parts
        for depth in range(len(names) + 1):
            folder = top.joinpath(*names[:depth])
            sizes = [*_lines(folder / limit), *_lines(folder / used)]
            if len(sizes) == 2 and sizes[0].isdecimal():  # without a limit it says 'max'
                stat = dict(entry.split() for entry in _lines(folder / 'memory.stat'))
                yield max(int(sizes[0]) - int(sizes[1]) + sum(int(stat.get(name, 0)) for name in cache), 0)


def _lines(path: Path) -> List[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
