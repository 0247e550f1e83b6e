"""Trains and measures one run of an experiment on digits in photographs: see experiments.py for the settings."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import openmmlab_run
from make_toy_data import voc


def prepare(folder: str) -> Path:
    """Makes the data where they are not there yet: digits on photographs, in the layout of PASCAL VOC."""
    place = Path(folder) / 'VOCdevkit'
    if not (place / 'VOC2007').exists():  # which is there once it is whole
        voc(place)
    return place


def run(folder: str, settings: dict, seed: int) -> dict:
    """Trains one detector in MMDetection and measures it at the end: see [`openmmlab_run.train`][].

    Args:
        folder: with the data, or where they are made.
        settings: ``config``, ``options``, and ``by_scores``: True gives RetinaNet, FCOS and ATSS the PS-KD term that
            the other one-stage detectors have.
        seed: of the first weights, the order and the dropout.
    """
    data = f'{prepare(folder)}/'
    by_scores = patch('selfkd_mmdet.pskd_hook.has_focal_loss', lambda model: False)
    with by_scores if settings.get('by_scores') else nullcontext():
        return openmmlab_run.train(settings['config'], data, seed, settings.get('options', {}))
