"""Runs functions in processes forked from this one, which has imported the toolkits already."""

import contextlib
import os
import secrets
import signal
import socket
import sys
import time
import traceback

import torch

SECONDS = 900

# Below those that systems hand out by themselves (Linux from 32768, macOS and Windows from 49152): with one of them,
# another test's connection may take the port between this look at it and its use.
PORTS = range(15000, 32000)


def free_port() -> int:
    """A port for processes to meet at."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(('', port := secrets.choice(PORTS)))
            return port


def in_processes(folder, function, processes=1, *, dies=False):
    """What ``function(rank)`` returned in each process, saved with torch.

    Args:
        folder: for the results, and for ``rank{i}.txt``, what the processes printed.
        function: runs with the environment that torchrun would give it.
        processes: how many; from two on they can form a process group.
        dies: whether the processes are expected to be killed instead.
    """
    children, port = [], free_port()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            environment = dict(
                RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1', MASTER_PORT=port
            )
            os.environ.update({name: str(value) for name, value in environment.items()})
            _child(folder, function, rank)
        children.append(child)
    statuses, deadline = [], time.time() + SECONDS
    for child in children:
        pid, status = os.waitpid(child, os.WNOHANG)
        while not pid:
            if time.time() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
            pid, status = os.waitpid(child, os.WNOHANG)
        statuses.append(status)
    output = '\n'.join((folder / f'rank{rank}.txt').read_text()[-3000:] for rank in range(processes))
    if dies:
        assert all(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL for status in statuses), output
        return []
    assert statuses == [0] * processes, output
    return [torch.load(folder / f'rank{rank}.pth', weights_only=False) for rank in range(processes)]


def _child(folder, function, rank):
    """Never returns: what pytest would do at the end of a process is its parent's business."""
    status = 1
    try:
        log = os.open(folder / f'rank{rank}.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, 'w')
        torch.save(function(rank), folder / f'rank{rank}.pth')
        if torch.distributed.is_initialized():
            # gloo's threads may still hold this rank's last tensors: to free them they need the interpreter, which
            # destroy_process_group keeps while it waits for them, in torch 2.1 for ever.
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
