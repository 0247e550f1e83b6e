"""The command ``selfkd train``."""

import argparse
import os
import re
from pathlib import Path
from typing import Sequence

from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from torch import nn

from selfkd.cli import command_parser, refusing
from selfkd.files import check_whole, output_folder

from .configs import load_config, refuse_lost_hooks
from .launch import leave_group, prepare_cpu_launch

__all__ = ['main', 'refuse_cut_checkpoint', 'refuse_ignored']


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
    """Some models (MMDetection's RPN) take any option, and leave what they do not know out without a word."""
    built = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    for name in re.findall(r"'type': '(selfkd_\w+\.\w+)'", str(cfg.model.to_dict())):
        name = name.split('.')[-1]
        if name not in built:
            raise ValueError(
                f'{name}: the config asks for it, but {cfg.model.type} was built without it, so training would be '
                'plain: the model has no such part; take another model, or leave the option out'
            )
