"""Runs functions and scripts in processes forked from this one, which has imported the toolkits already.

To import them takes 15 seconds of a processor, more than most of the tests' runs.
"""

import contextlib
import os
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from helpers import ROOT

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
        accelerate = sys.modules.get('accelerate')
        if accelerate is not None:  # a Trainer in an earlier test has left the state of a single process
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
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


def run_module(module, *arguments, folder, processes=1) -> str:
    """What ``python -m module`` printed in ``folder``, whose modules it may import; under torchrun if in several
    processes. It starts a new interpreter: for what cannot be forked from this one."""
    # torchrun's own choice of a port can be taken
    meet = ['--master_addr', '127.0.0.1', '--master_port', free_port()]
    launcher = ['torch.distributed.run', *meet, '--nproc_per_node', processes, '-m'] if processes > 1 else []
    path = [ROOT / 'plugins', ROOT / 'tests', folder, os.environ.get('PYTHONPATH', '')]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, path))}
    command = map(str, [sys.executable, '-m', *launcher, module, *arguments])
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert outcome.returncode == 0, outcome.stderr[-6000:]
    return outcome.stdout + outcome.stderr


def run_script(*arguments, folder=None):
    """``python ARGUMENTS`` in ``folder``, as subprocess.run gives it: a file, ``-m`` a module, or ``-c`` a program."""
    with tempfile.TemporaryDirectory() as outputs:
        logs = [Path(outputs, name) for name in ('stdout', 'stderr')]
        child = os.fork()
        if child == 0:
            _script([str(argument) for argument in arguments], folder, logs)
        _, status = os.waitpid(child, 0)
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        return subprocess.CompletedProcess(arguments, code, *(log.read_text() for log in logs))


def _script(arguments, folder, logs):
    """Never returns."""
    code = 1
    try:
        for descriptor, log in enumerate(logs, 1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
        os.chdir(folder or os.getcwd())
        what, *rest = arguments
        sys.argv = arguments if what not in ('-m', '-c') else [what, *rest[1:]]
        if what == '-m':
            runpy.run_module(rest[0], run_name='__main__')
        elif what == '-c':
            exec(compile(rest[0], '<string>', 'exec'), {'__name__': '__main__'})
        else:
            runpy.run_path(what, run_name='__main__')
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
