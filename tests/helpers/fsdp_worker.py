"""What test_runners.py runs in two processes: FlexibleRunner with FSDP on CPUs. Arguments: the digits, and a folder."""

import os
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.runner import FlexibleRunner

from helpers.mmengine import digits_config, find_hook
from selfkd_mmengine.launch import leave_group, prepare_cpu_launch


def threads_of_process():
    """How many threads the process has, those of torch included."""
    return len(os.listdir('/proc/self/task')) if sys.platform == 'linux' else 0


def run(digits, folder, *hooks):
    wrapper = dict(type='MMFullyShardedDataParallel', use_orig_params=True, device_id=torch.device('cpu'))
    cfg = digits_config(digits, folder, *hooks)
    cfg.update(
        runner_type='FlexibleRunner',
        launcher='pytorch',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        strategy=dict(type='FSDPStrategy', model_wrapper=wrapper, state_dict_cfg='full'),
    )
    cfg.default_hooks.checkpoint = None  # without a GPU, torch's FSDP does not survive making a full state dict
    cfg.auto_scale_lr = None
    for part in ('val', 'test'):
        cfg[f'{part}_cfg'] = cfg[f'{part}_dataloader'] = cfg[f'{part}_evaluator'] = None
    runner = FlexibleRunner.from_cfg(cfg)
    runner.train()
    return runner


def main(digits, folder, what):
    pskd = dict(type='selfkd_mmpretrain.PSKDHook')
    try:
        run(digits, folder / 'snapshot', dict(pskd, teacher='snapshot'))
    except ValueError as error:
        (folder / f'refusal{get_rank()}.txt').write_text(str(error))
    if what == 'bank':
        runner = run(digits, folder / 'bank', pskd, dict(type='selfkd_mmpretrain.CSKDHook'))
        logs = {key.split('/')[1]: log.data[0].tolist() for key, log in runner.message_hub.log_scalars.items()}
        torch.save(
            dict(bank=find_hook(runner, 'PSKDHook').past.bank.state_dict(), logs=logs), folder / f'{get_rank()}.pth'
        )


if __name__ == '__main__':
    prepare_cpu_launch(Config(dict(launcher='pytorch')))
    threads = threads_of_process()
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    leave_group()
    assert sys.platform != 'linux' or threads_of_process() < threads  # a thread of the group may abort the process
