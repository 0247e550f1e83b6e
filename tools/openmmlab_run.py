"""One run of an experiment in MMDetection or MMSegmentation: what is trained is a config of configs/, what is measured
is what its evaluation logs at the end."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any, Dict

import torch

ROOT = Path(__file__).resolve().parent.parent
CLONE = 'git clone https://github.com'
PARTS = ('train', 'val', 'test')


def train(config: str, data: str, seed: int, options: Dict[str, Any]) -> dict:
    """Trains a model and measures it at the end.

    Args:
        config: a file in configs/.
        data: the data root of its loaders.
        seed: of the first weights, the order and the dropout.
        options: override its settings.

    Returns:
        ``measures`` of the ``last`` weights, by the toolkit's names, and ``seconds``: of a core's time.
    """
    from mmengine.runner import Runner

    from selfkd.runs import logged_measures
    from selfkd_mmengine.configs import load_config
    from selfkd_mmengine.train import refuse_ignored

    torch.set_num_threads(1)
    started = time.process_time()
    cfg = load_config(str(ROOT / 'configs' / config))
    cfg.merge_from_dict(options)
    cfg.merge_from_dict({f'{part}_dataloader.dataset.data_root': data for part in PARTS})
    cfg.merge_from_dict({'randomness.seed': seed, 'default_hooks.checkpoint.interval': -1})
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        # mmengine keeps loggers and visualizers by this name, and would write into an earlier run's folder.
        cfg.experiment_name = os.path.basename(cfg.work_dir)
        runner = Runner.from_cfg(cfg)
        refuse_ignored(cfg, runner.model)
        runner.train()
        measures = logged_measures(cfg.work_dir)
    return dict(measures={'last': measures}, seconds=time.process_time() - started)
