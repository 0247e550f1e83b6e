"""The pictures of tools/draw_segmentation.py."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from draw_segmentation import colors, draw_attention, draw_predictions, load, predict
from helpers import ROOT
from helpers.mmengine import train
from helpers.mmseg import config
from matplotlib.figure import Figure
from PIL import Image


def test_pictures_of_predictions_and_attention(voc, tmp_path, monkeypatch):
    options = {'train_cfg.max_iters': 1}
    train(plain := config(voc / 'VOC2007', tmp_path / 'plain', **options))
    options['model.type'] = 'selfkd_mmseg.FRSKDEncoderDecoder'
    options['model.self_teacher'] = dict(warmup=0.0)
    train(frskd := config(voc / 'VOC2007', tmp_path / 'frskd', **options))
    models = []
    for cfg in (plain, frskd):
        cfg.dump(f'{cfg.work_dir}/config.py')
        models.append(f'{cfg.work_dir}/config.py,{cfg.work_dir}/iter_1.pth')
    out = tmp_path / 'out.png'
    command = [sys.executable, str(ROOT / 'tools/draw_segmentation.py'), 'predictions', str(out)]
    command += [f'plain={models[0]}', f'FRSKD={models[1]}', '--images', '0', '1']
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    width, height = Image.open(out).size
    assert width > 1.5 * height > 300  # four columns, two rows
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, 'savefig', lambda self, *args, **kwargs: figures.append(self) or save(self, *args, **kwargs)
    )
    draw_attention(*models[1].split(','), [1], str(out))
    assert 'each panel has its own scale' in figures[-1].get_supxlabel()
    assert Image.open(out).size[0] > width  # a column for each of four maps
    with pytest.raises(ValueError, match='the model has no self-teacher'):
        draw_attention(*models[0].split(','), [1], str(out))

    # The legend names what any of the models predicts.
    def predict_one_class(model, dataset, i):
        image, sample = predict(model, dataset, i)
        sample.gt_sem_seg.data.fill_(0)
        sample.pred_sem_seg.data.fill_(hasattr(model, 'self_teacher'))
        return image, sample

    monkeypatch.setattr('draw_segmentation.predict', predict_one_class)
    for order in (models, models[::-1]):
        draw_predictions({name: name.split(',') for name in order}, [0], str(out))
        names = {text.get_text() for text in figures[-1].legends[0].get_texts()}
        assert names == {'background', 'digit'}

    model, dataset = load(*models[0].split(','))
    image, sample = predict(model, dataset, 1)
    assert image.shape == (128, 128, 3)
    painted = colors(dataset, sample.gt_sem_seg.data[0])
    label = np.asarray(Image.open(sample.seg_map_path))
    assert (painted[label == 255] == 255).all()  # outlines are white
    assert (painted[label == 0] == dataset.metainfo['palette'][0]).all()
    assert torch.equal(sample.pred_sem_seg.data[0], sample.seg_logits.data.argmax(0))
