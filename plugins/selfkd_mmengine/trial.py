"""One trial: a few steps of a config in a process of its own, plain or with a method, and what became of them.

``selfkd doctor`` tries a user's config, tools/survey.py a config of every family in the toolkits' own zoos.
"""

import json
import multiprocessing
import os
import re
import tempfile
import time
import traceback
from math import inf, isfinite
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.utils.dl_utils import collect_env

from selfkd.teacher import unwrap

from .pskd_hook import PSKDHookBase
from .train import refuse_ignored

__all__ = ['METHODS', 'Outcome', 'classify', 'forget_weights', 'refusal', 'train']

SECONDS = 1200  # for one trial
OURS = r'(?:PSKDHook|CSKDHook|FRSKD\w+|self_teacher|SelfTeacher)'  # what a refusal of ours begins with
METHODS: Dict[str, Dict[str, dict]] = {
    'mmpretrain': {
        'PS-KD': {'default_hooks.pskd.type': 'selfkd_mmpretrain.PSKDHook'},
        'CS-KD': {'default_hooks.cskd.type': 'selfkd_mmpretrain.CSKDHook'},
        'FRSKD': {'model.type': 'selfkd_mmpretrain.FRSKDImageClassifier'},
    },
    'mmdet': {
        'PS-KD': {'default_hooks.pskd.type': 'selfkd_mmdet.PSKDHook'},
        'CS-KD': {'default_hooks.cskd.type': 'selfkd_mmdet.CSKDHook'},
        'FRSKD': {'model.roi_head.type': 'selfkd_mmdet.FRSKDRoIHead'},
    },
    'mmseg': {
        'PS-KD': {'default_hooks.pskd.type': 'selfkd_mmseg.PSKDHook'},
        'FRSKD': {'model.type': 'selfkd_mmseg.FRSKDEncoderDecoder', 'model.self_teacher.warmup': 0.0},
    },
}


class Outcome(NamedTuple):
    """How a trial ended.

    Attributes:
        losses: what each step logged, name -> value; fewer than asked for if it ended early.
        error: the message it ended with, or None.
        seconds: what the quicker step of the last epoch took: on CPUs processor time, which other work does not
            lengthen.
        bytes: the most memory that was allocated on the accelerator; 0 on CPUs.
        teacher: PS-KD: which teacher was taken, and why.
    """

    losses: List[Dict[str, float]]
    error: Optional[str] = None
    seconds: float = 0.0
    bytes: int = 0
    teacher: str = ''


def train(cfg: Config) -> Outcome:
    """Trains a config in a process of its own, which may crash or hang."""
    # A process that was forked cannot use CUDA; one that was spawned takes seconds to import the toolkits.
    context: Any = multiprocessing.get_context('spawn' if torch.cuda.is_available() else 'fork')
    collect_env()  # mmengine logs it in each process, which takes seconds where what it imports is not there yet
    with tempfile.NamedTemporaryFile('r') as result:
        child = context.Process(target=_train, args=(cfg, result.name))
        child.start()
        child.join(SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
            return Outcome([], f'took more than {SECONDS} seconds')
        text = result.read()
        return Outcome(**json.loads(text)) if text else Outcome([], 'the process died')


def _train(cfg: Config, result: str) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    steps = _Steps()
    outcome: Dict[str, Any] = {'losses': steps.losses}
    # mmengine formats the whole config for its logs, which takes longer than the steps.
    object.__setattr__(cfg, '_format_python_code', False)
    try:
        runner = Runner.from_cfg(cfg)
        refuse_ignored(cfg, runner.model)  # as `selfkd train` does
        runner.register_hook(steps, priority='LOWEST')
        runner.train()
        outcome.update(seconds=steps.seconds, teacher=_teacher(runner))
        if torch.cuda.is_available():
            outcome['bytes'] = torch.cuda.max_memory_allocated()
    except BaseException as problem:  # a toolkit may also exit
        where = traceback.extract_tb(problem.__traceback__)[-1]
        outcome['error'] = f'{type(problem).__name__}: {str(problem) or where.line}'
    Path(result).write_text(json.dumps(outcome))


def _teacher(runner: Runner) -> str:
    """The teacher that PS-KD took, and why."""
    for hook in runner.hooks:
        if isinstance(hook, PSKDHookBase):
            obstacle, _ = hook.obstacle(runner, unwrap(runner.model))
            reason = 'each sample keeps its identity' if obstacle is None else obstacle
            return f'teacher {hook.source!r}' + (f': {reason}' if hook.teacher == 'auto' else '')
    return ''


class _Steps(Hook):
    def __init__(self) -> None:
        self.losses: List[Dict[str, float]] = []
        self.seconds = self._began = 0.0
        self._now = time.perf_counter if torch.cuda.is_available() else time.process_time

    def before_train_epoch(self, runner) -> None:
        self.seconds = inf

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._began = self._now()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        # Reading the losses waits for the accelerator.
        self.losses.append(
            {name: float(value) for name, value in outputs.items() if torch.as_tensor(value).numel() == 1}
        )
        self.seconds = min(self.seconds, self._now() - self._began)


def refusal(method: str, trained: Outcome) -> Optional[str]:
    """``refused: ...`` if the training was refused by name before its first step."""
    message = (trained.error or '').strip().split('\n')[0]
    ours = re.match(rf'\w+: (?:class `\w+` in \S+: )*({OURS}: .*)', message)
    if ours and not trained.losses:
        return f'refused: {ours[1]}'
    if method == 'FRSKD' and "unexpected keyword argument 'roi_head'" in message:
        return 'refused: by MMDetection, a detector without regions has no roi_head'
    return None


def classify(method: str, plain: Outcome, trained: Outcome) -> str:
    """What became of a training that was not refused: ``trains``, ``toolkit: ...`` (it cannot run the config here) or
    ``DEFECT: ...``."""
    message = (trained.error or '').strip().split('\n')[0]
    if plain.error:
        return 'toolkit: ' + plain.error.strip().split('\n')[0]
    if not all(isfinite(value) for step in plain.losses for name, value in step.items() if 'loss' in name):
        return 'toolkit: its plain loss is not finite here'
    if trained.error:
        return f'DEFECT: after {len(trained.losses)} steps {message}'
    first, last = (_total(trained.losses[i]) - _total(plain.losses[i]) for i in (0, -1))
    if method.startswith('PS-KD') and abs(first) > 1e-4 * abs(_total(plain.losses[0])):
        return f'DEFECT: the first step, without a past, differs from the plain one by {first:.2e}'
    # The quality focal loss from a past that has hardly changed is there, but lost in a sum of float32.
    acts = abs(last) > 1e-7 * abs(_total(plain.losses[-1])) or trained.losses[-1].get('pskd_soft', 0) > 0
    if not (isfinite(last) and acts):
        return f'DEFECT: the last loss differs from the plain one by {last:.2e}'
    return 'trains'


def _total(step: Dict[str, float]) -> float:
    """What was trained on: mmengine logs it as ``loss``, unless an entry of that name stands for itself."""
    parts = sum(value for name, value in step.items() if 'loss' in name and name != 'loss')
    loss = step.get('loss', parts)
    return loss if not parts or abs(loss - parts) < 1e-4 * abs(parts) else loss + parts


def forget_weights(node) -> None:
    """Drops whatever names a file of weights."""
    if isinstance(node, (list, tuple)):
        for child in node:
            forget_weights(child)
    if not isinstance(node, dict):
        return
    if isinstance(node.get('init_cfg'), dict) and 'checkpoint' in node['init_cfg']:
        node['init_cfg'] = None
    for name in ('pretrained', 'teacher_ckpt'):
        if isinstance(node.get(name), str):
            node[name] = None
    for key, child in list(node.items()):
        if key not in ('init_cfg', 'train_dataloader', 'val_dataloader', 'test_dataloader'):
            forget_weights(child)
