"""Trains and measures one run of an experiment in MMDetection: see experiments.py for the settings.

What is trained is a config of configs/mmdet. What is measured is what its evaluation logs at the end.
"""

import os
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from make_toy_data import voc

ROOT = Path(__file__).resolve().parent.parent


def prepare(folder: str) -> Path:
    """Makes the data where they are not there yet: digits on photographs, in the layout of PASCAL VOC."""
    place = Path(folder) / 'VOCdevkit'
    if not (place / 'VOC2007').exists():  # which is there once it is whole
        voc(place)
    return place


def run(folder: str, settings: dict, seed: int) -> dict:
    """Trains one detector and measures it at the end.

    Args:
        folder: with the data, or where they are made.
        settings: ``config``, a file of configs; ``options``, which override its settings; and ``by_scores``: True
            gives RetinaNet, FCOS and ATSS the PS-KD term that the other one-stage detectors have.
        seed: of the first weights, the order and the dropout.

    Returns:
        ``measures`` of the ``last`` weights, by the toolkit's names, and ``seconds``: of a core's time.
    """
    from mmengine.runner import Runner

    from selfkd.runs import logged_measures
    from selfkd_mmengine.configs import load_config
    from selfkd_mmengine.train import refuse_ignored

    torch.set_num_threads(1)
    data, started = prepare(folder), time.process_time()
    cfg = load_config(str(ROOT / 'configs' / settings['config']))
    cfg.merge_from_dict(settings.get('options', {}))
    cfg.merge_from_dict({f'{part}_dataloader.dataset.data_root': f'{data}/' for part in ('train', 'val', 'test')})
    cfg.merge_from_dict({'randomness.seed': seed, 'default_hooks.checkpoint.interval': -1})
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        # mmengine keeps loggers and visualizers by this name, and would write into an earlier run's folder.
        cfg.experiment_name = os.path.basename(cfg.work_dir)
        runner = Runner.from_cfg(cfg)
        refuse_ignored(cfg, runner.model)
        if settings.get('by_scores'):
            with patch('selfkd_mmdet.pskd_hook.has_focal_loss', lambda model: False):
                runner.train()
        else:
            runner.train()
        measures = logged_measures(cfg.work_dir)
    return dict(measures={'last': measures}, seconds=time.process_time() - started)
