"""The command ``selfkd train``."""

import argparse
import inspect
import os
import re
from pathlib import Path
from typing import Sequence

from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from selfkd.cli import command_parser, refusing
from selfkd.files import check_whole, output_folder

from .configs import load_config, refuse_lost_hooks
from .launch import leave_group, prepare_cpu_launch

__all__ = ['main', 'refuse_cut_checkpoint', 'refuse_ignored']

OURS = r"'type': '(selfkd_\w+\.\w+)'"
LOGGED = {'PSKDHook': r'train/(s\d+\.)?pskd_', 'CSKDHook': r'train/(s\d+\.)?loss_cskd'}


def main(arguments: Sequence[str]) -> None:
    """Trains a config of MMPretrain, MMDetection or MMSegmentation, as their own training scripts do.

        selfkd train CONFIG [--work-dir DIR] [--resume [CHECKPOINT]] [--cfg-options KEY=VALUE ...]
        torchrun --nproc_per_node 2 -m selfkd train CONFIG --launcher pytorch

        selfkd train my_config.py --cfg-options default_hooks.pskd.type=selfkd_mmpretrain.PSKDHook

    CONFIG is a file, PACKAGE::PATH of a toolkit, or one of ours (`selfkd config` lists them); a file may name ours
    among its _base_. The second form also works on machines without a GPU.
    """
    parser = command_parser('train', main.__doc__)
    parser.add_argument('config')
    parser.add_argument('--work-dir', help='logs and checkpoints (default: work_dirs/ and the name of the config)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='a checkpoint to resume from; without a value, the latest in the work dir',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, help='settings that override the config'
    )
    parser.add_argument('--launcher', default='none', choices=['none', 'pytorch', 'slurm', 'mpi'])
    # the launcher of torch 1.x passes --local_rank, torchrun sets LOCAL_RANK
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    with refusing(parser, ModuleNotFoundError):
        cfg = load_config(args.config)
        refuse_lost_hooks(args.config)
    cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(cfg.filename).stem))
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    with refusing(parser):
        output_folder(cfg.work_dir)
        refuse_cut_checkpoint(cfg)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    prepare_cpu_launch(cfg)
    runner = Runner.from_cfg(cfg)
    refuse_ignored(cfg, runner.model)
    runner.register_hook(StaleLogs())
    runner.train()
    del runner
    leave_group()


def refuse_cut_checkpoint(cfg: Config) -> None:
    """OSError or ValueError: the file that training starts from, or goes on from, is not there, or not whole."""
    start, pointer = cfg.get('load_from'), Path(cfg.work_dir, 'last_checkpoint')
    if cfg.get('resume') and not start and pointer.exists():
        start = pointer.read_text().strip()
        if not start:  # the run was killed as it wrote it
            raise ValueError(f'{pointer}: is empty, name a checkpoint after --resume')
    if start and '://' not in start:
        check_whole(start)


def refuse_ignored(cfg: Config, model: nn.Module) -> None:
    """What the config asks for, and nothing reads: a section whose name the runner does not know (``default_hook``), or
    an option of a model that takes any (MMDetection's RPN)."""
    sections, known = cfg.to_dict(), inspect.signature(Runner.__init__).parameters
    read = str([content for section, content in sections.items() if section in known])
    for section, content in sections.items():
        for name in re.findall(OURS, str({section: content})):
            if f"'{name}'" not in read:  # a variable of the config may be used in a section that is read
                raise ValueError(
                    f'{section}: asks for {name}, and no part of MMEngine reads a section of this name, so training '
                    'would be plain: hooks go into default_hooks, networks into model'
                )
    built = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    for name in re.findall(OURS, str(cfg.model.to_dict())):
        name = name.split('.')[-1]
        if name not in built:
            raise ValueError(
                f'{name}: the config asks for it, but {cfg.model.type} was built without it, so training would be '
                'plain: the model has no such part; take another model, or leave the option out'
            )


class StaleLogs(Hook):
    """A run that was trained with a hook of ours may be resumed without it. MMEngine restores what was logged, and
    would print the hook's last numbers to the end of training."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not runner._resume or 'message_hub' not in checkpoint:
            return
        scalars, resumed = (checkpoint['message_hub'][name] for name in ('log_scalars', 'resumed_keys'))
        for name, logged in LOGGED.items():
            stale = [key for key in scalars if re.match(logged, key)]
            if stale and all(type(hook).__name__ != name for hook in runner.hooks):
                runner.logger.warning(
                    f'the checkpoint was trained with {name}, and this config has no such hook: training goes on '
                    'without the method'
                )
                for key in stale:
                    del scalars[key]
                    resumed.pop(key, None)
