"""One training of the survey: two steps of a config, in a process of its own, which may crash or hang."""

import json
import os
import signal
import tempfile
import time
import traceback
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from selfkd_mmengine.train import refuse_ignored

SECONDS = 1200  # for one training of two steps


class Outcome(NamedTuple):
    """How a training of two steps ended.

    Attributes:
        losses: what each step logged, name -> value; fewer than two where it ended early.
        error: the message it ended with, or None.
    """

    losses: List[Dict[str, float]]
    error: Optional[str] = None


def train_two_steps(cfg: Config) -> Outcome:
    """Trains in a process of its own, which may crash or hang."""
    with tempfile.NamedTemporaryFile('r') as result:
        child = os.fork()
        if child == 0:
            _in_child(lambda: _train(cfg, result.name))
        deadline = time.time() + SECONDS
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.time() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Outcome([], f'took more than {SECONDS} seconds')
            time.sleep(0.05)
        text = result.read()
        return Outcome(**json.loads(text)) if text else Outcome([], 'the process died')


def _in_child(function: Callable) -> None:
    """Ends this process after the call, whatever it does."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    try:
        function()
    finally:
        os._exit(0)


def _train(cfg: Config, result: str) -> None:
    from mmengine.registry import RUNNERS  # noqa: F401  (registers the toolkit's scope)
    from mmengine.runner import Runner

    losses, error = [], None
    try:
        runner = Runner.from_cfg(cfg)
        refuse_ignored(cfg, runner.model)  # as `selfkd train` does
        runner.register_hook(_Losses(losses), priority='LOWEST')
        runner.train()
    except BaseException as problem:  # a toolkit may also exit
        where = traceback.extract_tb(problem.__traceback__)[-1]
        error = f'{type(problem).__name__}: {str(problem) or where.line}'
    Path(result).write_text(json.dumps({'losses': losses, 'error': error}))


class _Losses(Hook):
    def __init__(self, losses: list):
        self.losses = losses

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.losses.append(
            {name: float(value) for name, value in outputs.items() if torch.as_tensor(value).numel() == 1}
        )
