"""Trains what is missing of an experiment, several runs at once, and adds a line of JSON for each to its file."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import platform
import subprocess
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Dict, Iterator, List

from experiments import Experiment

# A thread each, and memory that a step frees stays with the process: where each step asked for it anew, a quarter of
# the time and more went into page faults. glibc reads these names; elsewhere they do nothing.
ENVIRONMENT = {'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2**40)}
ROOT = Path(__file__).resolve().parent.parent


def runs_of(experiment: Experiment) -> List[dict]:
    """All runs, seed by seed, so that whatever is finished is as many runs of each method, give or take one."""
    return [
        dict(panel=panel, method=name, seed=seed, settings={**experiment.settings, **shared, **method})
        for seed in range(experiment.seeds)
        for panel, shared in experiment.panels.items()
        for name, method in experiment.methods.items()
    ]


def finished(path: Path, experiment: Experiment) -> List[dict]:
    """The lines of the file that are runs of the experiment as it is defined now, in the experiment's order."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {_key(line): line for line in lines}
    return [{**found[_key(run)], **run} for run in runs_of(experiment) if _key(run) in found]


def train_missing(path: Path, experiment: Experiment, data: str, processes: int) -> None:
    """Runs what the file has no line of. A run that was cut short has none, and begins anew.

    Raises:
        RuntimeError: another runner is at work on this file.
    """
    import_module(experiment.module).prepare(data)  # refused before anything is trained
    path.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    with _opened(path) as file:
        done = {_key(line) for line in finished(path, experiment)}
        missing = [run for run in runs_of(experiment) if _key(run) not in done]
        print(f'{len(done)} runs are there, {len(missing)} to go', flush=True)
        origin = dict(commit=_commit(), versions=_versions())
        context = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(processes, context, _end_with_parent) as pool:
            jobs = {pool.submit(_train, experiment.module, data, run): run for run in missing}
            try:
                for job in as_completed(jobs):
                    line = {**jobs[job], **origin, **job.result()}
                    file.write(json.dumps(line) + '\n')
                    file.flush()
                    what = ', '.join(filter(None, (line['panel'], line['method'], f'seed {line["seed"]}')))
                    print(f'{time.strftime("%H:%M")} {what}: {line["seconds"]:.0f} s', flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _train(module: str, data: str, run: dict) -> dict:
    return import_module(module).run(data, run['settings'], run['seed'])


def _end_with_parent() -> None:
    """A runner that is killed leaves no training behind."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    """The file, locked, without the half of a line that a runner killed while writing would have left."""
    with open(path, 'a+') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f'{path}: another runner is at work on this experiment') from error
        file.seek(0)
        whole = file.read().rpartition('\n')
        file.truncate(len((whole[0] + whole[1]).encode()))
        yield file


def _key(run: dict) -> str:
    return json.dumps([run['method'], run['seed'], run['settings']], sort_keys=True)


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git('status', '--porcelain', '--', 'plugins', 'tools')
    return git('rev-parse', '--short=12', 'HEAD') + '+changes' * bool(changed)


def _versions() -> Dict[str, str]:
    import torch

    return {'python': platform.python_version(), 'torch': torch.__version__, 'machine': platform.machine()}
