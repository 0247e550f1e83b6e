"""Distributed training on machines without a GPU, which mmengine's launcher does not cover."""

import os

import torch
import torch.distributed as torch_dist
from mmengine.config import Config

__all__ = ['leave_group', 'prepare_cpu_launch']


def prepare_cpu_launch(cfg: Config) -> None:
    """Lets ``launcher='pytorch'`` work under ``torchrun`` on CPUs: a gloo group, and a DDP wrapper without device ids.

    mmengine's own set-up selects a CUDA device whatever the backend; it leaves a process group alone that exists
    already. Does nothing where there is a GPU or no launcher.
    """
    if cfg.get('launcher', 'none') == 'none' or torch.cuda.is_available():
        return
    if cfg.launcher != 'pytorch' or 'RANK' not in os.environ:
        raise ValueError(
            f"launcher: on a machine without a GPU start with torchrun and 'pytorch', got {cfg.launcher!r}"
        )
    if not torch_dist.is_initialized():
        torch_dist.init_process_group('gloo')
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    wrapper['find_unused_parameters'] = cfg.get('find_unused_parameters', False)
    cfg.model_wrapper_cfg = cfg.get('model_wrapper_cfg') or wrapper


def leave_group() -> None:
    """Tears down the process group at the end of a script: a process that ends inside one may abort."""
    if torch_dist.is_available() and torch_dist.is_initialized():
        torch_dist.barrier()  # the last rank may still be talking to the first
        torch_dist.destroy_process_group()
