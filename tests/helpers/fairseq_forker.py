"""Runs fairseq's command-line programs in processes forked from one that has imported them already.

Each program still runs from its own entry point in a process of its own; what is saved is the 3 seconds of importing
fairseq. Reads a JSON object a line: {"start": [program, argument, ...], "log": file, "cwd": folder} is answered with
the process id, {"wait": id} with the exit status (negative: killed by that signal).
"""

import itertools
import json
import os
import signal
import sys
import traceback

PROGRAMS = {
    'fairseq-train': 'fairseq_cli.train',
    'fairseq-hydra-train': 'fairseq_cli.hydra_train',
    'fairseq-generate': 'fairseq_cli.generate',
    'fairseq-interactive': 'fairseq_cli.interactive',
    'fairseq-preprocess': 'fairseq_cli.preprocess',
    'fairseq-validate': 'fairseq_cli.validate',
}


def run(argv, log, cwd, out_of_memory_at=None, killed_at=None):
    os.setsid()
    signal.alarm(900)  # processes that wait for each other for ever
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    sys.argv = argv
    allow_pytorch_ddp_on_cpu()
    if out_of_memory_at:
        in_training_step(out_of_memory_at, run_out_of_memory)
    if killed_at:
        in_training_step(killed_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    status = 0
    try:
        sys.modules[PROGRAMS[argv[0]]].cli_main()
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(bool(e.code))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def allow_pytorch_ddp_on_cpu():
    """fairseq passes device_ids to torch's DistributedDataParallel even on the CPU, where torch refuses them."""
    from fairseq.models import distributed_fairseq_model as module

    ddp = module.DistributedDataParallel
    module.DistributedDataParallel = lambda *args, device_ids, output_device, **kwargs: ddp(*args, **kwargs)


def in_training_step(step, action):
    """What happens in this training step, from 1."""
    from fairseq.tasks.fairseq_task import FairseqTask

    train_step, count = FairseqTask.train_step, itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(count) == step:
            action()
        return train_step(*args, **kwargs)

    FairseqTask.train_step = wrapped


def run_out_of_memory():
    """As a GPU would."""
    raise RuntimeError('CUDA out of memory')


if __name__ == '__main__':
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    for module in PROGRAMS.values():
        __import__(module)
    for line in sys.stdin:
        command = json.loads(line)
        if 'wait' in command:
            _, status = os.waitpid(command['wait'], 0)
            answer = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        else:
            answer = os.fork()
            if not answer:
                run(command['start'], command['log'], command['cwd'], command['out_of_memory_at'], command['killed_at'])
        print(answer, file=answers, flush=True)
