"""A small parallel corpus and a way to run fairseq's programs on it."""

import argparse
import json
import os
import random
import re
import subprocess
import sys

import pytest

from helpers import ROOT
from helpers.processes import free_port

USER_DIR = str(ROOT / 'plugins/selfkd_fairseq')
MODEL = {
    'transformer': (
        '--arch transformer --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 32 --decoder-embed-dim 32 '
        '--encoder-ffn-embed-dim 64 --decoder-ffn-embed-dim 64 --encoder-attention-heads 2 --decoder-attention-heads 2'
    ),
    'lstm': '--arch lstm --encoder-embed-dim 32 --decoder-embed-dim 32 --encoder-hidden-size 32 '
    '--decoder-hidden-size 32 --decoder-out-embed-dim 32 --encoder-layers 1 --decoder-layers 1',
    'fconv': '--arch fconv --encoder-embed-dim 32 --decoder-embed-dim 32 --decoder-out-embed-dim 32 '
    '--encoder-layers [(32,3)] --decoder-layers [(32,3)]',
    's2t': '--task speech_to_text --arch s2t_transformer --conv-channels 32 --encoder-layers 1 --decoder-layers 1 '
    '--encoder-embed-dim 32 --decoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2 '
    '--decoder-attention-heads 2',
    'lm': '--arch transformer_lm --decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 '
    '--decoder-attention-heads 2',
}


class Fairseq:
    """Starts programs, and keeps their logs in a folder."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'CUDA_VISIBLE_DEVICES': ''}
        env['PYTHONPATH'] = os.pathsep.join([str(ROOT / 'tests'), env.get('PYTHONPATH', '')])
        self.server = subprocess.Popen(
            [sys.executable, '-m', 'helpers.fairseq_forker'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
        )

    def ask(self, **command):
        print(json.dumps(command), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def start(self, *argv, out_of_memory_at=None, killed_at=None):
        """Process id and log file of a program that is now running, and maybe fails once in that training step, or is
        killed in it."""
        self.count += 1
        log = self.folder / f'log{self.count}'
        log.touch()
        argv = [str(a) for arg in argv for a in (arg.split() if isinstance(arg, str) else [arg])]
        moments = dict(out_of_memory_at=out_of_memory_at, killed_at=killed_at)
        return self.ask(start=argv, log=str(log), cwd=str(self.folder), **moments), log

    def wait(self, pid):
        return self.ask(wait=pid)

    def run(self, *argv, fails=False):
        """What a program printed. ``fails``: whether it is expected to."""
        pid, log = self.start(*argv)
        status = self.wait(pid)
        text = log.read_text()
        assert (status != 0) == fails, f'{argv}: exit status {status}\n{text[-3000:]}'
        return text

    def train_args(self, save, *args, model='transformer', data='bin'):
        return (
            (
                f'fairseq-train {data} --user-dir {USER_DIR} --cpu --seed 7 --optimizer adam --lr 0.005 '
                f'--max-tokens 500 --save-dir {save} --log-format json --log-interval 1 --update-epoch-batch-itr True '
                f'--required-batch-size-multiple 1 --num-workers 0 {MODEL[model]}'
            ),
            *args,
        )

    def train(self, save, *args, fails=False, **kwargs):
        return Log(self.run(*self.train_args(save, *args, **kwargs), fails=fails))

    def train_together(self, save, *args, processes=2, out_of_memory_at=None):
        """The logs of several processes that train one model on the CPU (fairseq itself spawns them for GPUs only).

        ``out_of_memory_at``: the training step that fails on the last of them.
        """
        port = free_port()
        started = [
            self.start(
                *self.train_args(save, *args),
                f'--distributed-world-size {processes} --distributed-rank {rank} --distributed-no-spawn '
                f'--distributed-backend gloo --distributed-init-method tcp://127.0.0.1:{port}',
                out_of_memory_at=out_of_memory_at if rank == processes - 1 else None,
            )
            for rank in range(processes)
        ]
        statuses = [self.wait(pid) for pid, _ in started]
        logs = [log.read_text() for _, log in started]
        assert statuses == [0] * processes, '\n\n'.join(log[-2000:] for log in logs)
        return [Log(log) for log in logs]

    def checkpoint(self, path):
        import torch

        if hasattr(torch.serialization, 'add_safe_globals'):  # the model's settings, as fairseq-train saves them
            torch.serialization.add_safe_globals([argparse.Namespace])
        return torch.load(self.folder / path, map_location='cpu')

    def first(self, pattern):
        """The first file of this name, by update."""
        return min(self.folder.glob(pattern), key=lambda path: int(path.stem.split('_')[-1]))

    def weights(self, save, name='checkpoint_last.pt'):
        weights = self.checkpoint(f'{save}/{name}')['model']
        # fairseq 0.12.2 also saves memory that was never written to, and copies of weights for evaluation as they were
        # when a checkpoint was loaded last: neither takes part in training.
        unused = re.compile(r'_float_tensor$|layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$')
        return {k: v for k, v in weights.items() if not unused.search(k)}

    def close(self):
        # Not by closing its input: processes that other tests fork hold it too (mmdet's evaluation leaves some).
        self.server.terminate()
        self.server.wait()


class Log(str):
    """The output of fairseq-train with --log-format json."""

    def stats(self, tag):
        """The log entries of train, train_inner or valid, in order."""
        found = re.findall(rf'\| {tag} \| (\{{.*\}})$', self, flags=re.MULTILINE)
        return [
            {
                k: json.loads(v) if isinstance(v, str) and v[:1] in '-0123456789' else v
                for k, v in json.loads(line).items()
            }
            for line in found
        ]


def largest_difference(a, b):
    """Between two state dicts."""
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.fixture(scope='session')
def fairseq(tmp_path_factory):
    """Programs run in a folder with a translation corpus, ``bin``, and a language-model corpus, ``lm``."""
    pytest.importorskip('fairseq')
    folder = tmp_path_factory.mktemp('fairseq')
    rng = random.Random(0)
    words = [f'w{i}' for i in range(24)]
    for split, sentences in (('train', 300), ('valid', 40), ('test', 40)):
        lines = [[rng.choice(words) for _ in range(rng.randint(3, 9))] for _ in range(sentences)]
        (folder / f'{split}.de').write_text(''.join(' '.join(line) + '\n' for line in lines))
        (folder / f'{split}.en').write_text(''.join(' '.join(line[::-1]).upper() + '\n' for line in lines))
    programs = Fairseq(folder)
    splits = '--trainpref train --validpref valid --testpref test'
    programs.run(f'fairseq-preprocess -s de -t en {splits} --destdir bin')
    programs.run(
        'fairseq-preprocess -s de -t en --trainpref train --validpref valid --joined-dictionary --destdir joined'
    )
    programs.run('fairseq-preprocess --only-source --trainpref train.de --validpref valid.de --destdir lm')
    yield programs
    programs.close()
