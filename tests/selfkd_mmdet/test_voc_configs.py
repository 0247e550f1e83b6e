"""One option or one `_base_` line over MMDetection's own, unmodified PASCAL VOC configs (VOC07+12)."""

import shutil

import make_toy_data
import pytest
import torch
from helpers import ROOT
from helpers.mmengine import counter
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.runner import Runner
from mmengine.utils import get_installed_path

VOC_NAMES = ('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow')


@pytest.fixture(scope='module')
def devkit(tmp_path_factory):
    """VOC2007 and VOC2012 as MMDetection expects them, 2 + 2 training images of VOC's classes."""
    folder = tmp_path_factory.mktemp('data') / 'VOCdevkit'
    make_toy_data.voc(folder, train_size=2, test_size=1)
    for xml in folder.glob('VOC2007/Annotations/*.xml'):
        text = xml.read_text()
        for digit, name in zip(make_toy_data.DIGIT_NAMES, VOC_NAMES):
            text = text.replace(f'<name>{digit}</name>', f'<name>{name}</name>')
        xml.write_text(text)
    shutil.copytree(folder / 'VOC2007', folder / 'VOC2012')
    (folder / 'VOC2012/ImageSets/Main/test.txt').unlink()
    return folder


def run_four_steps(cfg, devkit, work_dir) -> dict:
    """Two epochs of two steps (the past copy is there in the second) on small images and channels; the last losses."""
    small = {
        'work_dir': str(work_dir),
        'experiment_name': f'voc{next(counter)}',
        'log_level': 'ERROR',
        'model.backbone.depth': 18,
        'model.backbone.base_channels': 8,
        'model.backbone.stem_channels': 8,
        'model.backbone.init_cfg': None,
        'model.neck.in_channels': [8, 16, 32, 64],
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'train_dataloader.num_batch_per_epoch': 2,
        'train_cfg.max_epochs': 2,
        'train_cfg.val_begin': 9,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        'val_dataloader.dataset.data_root': f'{devkit}/',
    }
    cfg.merge_from_dict(small)
    if 'roi_head' in cfg.model:
        cfg.merge_from_dict({'model.roi_head.bbox_head.fc_out_channels': 32, 'model.train_cfg.rcnn.sampler.num': 32})
    for part in cfg.train_dataloader.dataset.dataset.datasets:
        part.data_root = f'{devkit}/'
        part.filter_cfg.update(min_size=8, bbox_min_size=8)
        next(step for step in part.pipeline if step.type == 'Resize').scale = (96, 96)
    runner = Runner.from_cfg(cfg)
    runner.train()
    # 3 times the images of VOC2007 and VOC2012
    assert len(runner.train_dataloader.dataset._dataset) == 3 * (2 + 2)
    scalars = runner.message_hub.log_scalars
    return {name[6:]: buffer.current() for name, buffer in scalars.items() if name.startswith('train/')}


@pytest.mark.parametrize(
    ('base', 'options', 'logged'),
    [
        ('faster-rcnn', {'default_hooks.pskd.type': 'selfkd_mmdet.PSKDHook'}, 'pskd_soft'),
        ('retinanet', {'default_hooks.pskd.type': 'selfkd_mmdet.PSKDHook'}, 'pskd_soft'),
        ('faster-rcnn', {'default_hooks.cskd.type': 'selfkd_mmdet.CSKDHook'}, 'loss_cskd'),
        ('faster-rcnn', {'model.roi_head.type': 'selfkd_mmdet.FRSKDRoIHead'}, 'loss_kd'),
    ],
)
def test_one_option(devkit, tmp_path, base, options, logged):
    cfg = get_config(f'mmdet::pascal_voc/{base}_r50_fpn_1x_voc0712.py')
    cfg.merge_from_dict(options)
    losses = run_four_steps(cfg, devkit, tmp_path)
    assert logged in losses
    assert torch.tensor(losses['loss']).isfinite()
    if logged == 'pskd_soft':
        assert losses[logged] > 0


@pytest.mark.parametrize(
    ('base', 'fragment', 'logged'),
    [
        ('faster-rcnn', 'pskd', 'pskd_soft'),
        ('retinanet', 'pskd', 'pskd_soft'),
        ('faster-rcnn', 'cskd', 'loss_cskd'),
    ],
)
def test_one_base_line(devkit, tmp_path, base, fragment, logged):
    installed = f'{get_installed_path("mmdet")}/.mim/configs/pascal_voc/{base}_r50_fpn_1x_voc0712.py'
    (tmp_path / 'config.py').write_text(
        f'_base_ = [{installed!r}, {str(ROOT / "configs/mmdet/_base_" / fragment)!r} + ".py"]\n'
    )
    assert logged in run_four_steps(Config.fromfile(tmp_path / 'config.py'), devkit, tmp_path)
