"""Trains and measures one run of an experiment on BCCD, blood cells in VOC's layout: see experiments.py."""

from pathlib import Path

import openmmlab_run
from openmmlab_run import CLONE


def prepare(folder: str) -> Path:
    """The data. FileNotFoundError: they are not there; the message says how to get them."""
    place = Path(folder) / 'BCCD'
    if not (place / 'ImageSets/Main').is_dir():
        raise FileNotFoundError(
            f'{folder}: must hold BCCD/ImageSets/Main, BCCD/Annotations and BCCD/JPEGImages:\n'
            f'  {CLONE}/Shenggan/BCCD_Dataset {folder}/BCCD_Dataset && ln -s BCCD_Dataset/BCCD {place}'
        )
    return place


def run(folder: str, settings: dict, seed: int) -> dict:
    """Trains one detector in MMDetection: see [`openmmlab_run.train`][]."""
    return openmmlab_run.train(settings['config'], f'{prepare(folder)}/', seed, settings.get('options', {}))
