"""Trains a config of MMPretrain, MMDetection or MMSegmentation, as `mim train` does.

    python tools/train.py CONFIG [--work-dir DIR] [--resume [CHECKPOINT]] [--cfg-options KEY=VALUE ...]
    torchrun --nproc_per_node 2 tools/train.py CONFIG --launcher pytorch

The second form also works on machines without a GPU.
"""

import argparse
import os
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from selfkd_mmengine.launch import leave_group, prepare_cpu_launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    # torchrun of torch 1.x passes --local_rank, later ones set LOCAL_RANK
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))

    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    prepare_cpu_launch(cfg)
    Runner.from_cfg(cfg).train()
    leave_group()


if __name__ == '__main__':
    main()
