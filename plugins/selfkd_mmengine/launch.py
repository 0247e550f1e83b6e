"""Distributed training on machines without a GPU, which mmengine's launcher does not cover."""

import gc
import os
from typing import Any

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
    """Tears down the process group at the end of a script, when the runner is not referred to any more.

    Threads of a gloo group drop the tensors that they were given last. One that does so while the interpreter shuts
    down aborts the process, and a model that was wrapped for the group keeps the group, and so its threads, alive.
    """
    if not (torch_dist.is_available() and torch_dist.is_initialized()):
        return
    torch_dist.barrier()  # the last rank may still be talking to the first
    for _ in range(2):  # runner and model are a cycle; what its tensors kept alive takes a second pass
        gc.collect()
    gloo = _gloo_backend()
    torch_dist.destroy_process_group()
    del gloo  # the last reference: waits for the threads, without keeping the interpreter from them


def _gloo_backend():
    try:
        world: Any = torch_dist.group.WORLD
        return world._get_backend(torch.device('cpu'))
    except (AttributeError, RuntimeError):  # a group for accelerators only
        return None
