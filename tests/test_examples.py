"""Every file in examples/ runs at toy size, and a page shows it."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import make_toy_data
import pytest
import torch
from helpers import ROOT
from helpers.processes import run_script

EXAMPLES = ROOT / 'examples'
NEEDS = {'own_loop': 'sklearn', 'frozen_function': 'torch', 'lightning_callback': 'lightning'}
NEEDS.update(trainer_images='transformers', trainer_language_model='transformers')


@pytest.mark.parametrize('name', list(NEEDS))
def test_a_script(name, tmp_path):
    pytest.importorskip(NEEDS[name])
    outcome = run_script(EXAMPLES / f'{name}.py', folder=tmp_path)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert 'alpha 0.' in outcome.stdout


def trained(toolkit, config, data, folder, *options):
    """The last checkpoint of ``selfkd train`` with a config, on other data and for a few steps."""
    pytest.importorskip(toolkit)
    from selfkd.cli import main

    small = [f'{split}_dataloader.dataset.data_root={data}' for split in ('train', 'val')]
    main(['train', str(EXAMPLES / config), '--work-dir', str(folder), '--cfg-options', *small, *options])
    return torch.load(Path((folder / 'last_checkpoint').read_text()), weights_only=False)


def test_mmpretrain(digits, tmp_path):
    checkpoint = trained('mmpretrain', 'mmpretrain_resnet.py', digits, tmp_path, 'train_cfg.max_epochs=2')
    assert checkpoint['selfkd']['PSKDHook']['bank']['seen'].all()


def test_mmdet_rtmdet(voc, tmp_path):
    options = ['train_cfg.max_epochs=2', 'train_dataloader.batch_size=2', 'train_cfg.val_interval=9']
    checkpoint = trained('mmdet', 'mmdet_rtmdet.py', voc, tmp_path, *options)
    assert checkpoint['meta']['iter'] == 4
    assert 'PSKDHook' in checkpoint['selfkd']
    assert 'ema_state_dict' in checkpoint  # RTMDet's own hook


def test_mmseg_fine_tuning(tmp_path):
    pytest.importorskip('mmseg')
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    make_toy_data.voc(tmp_path / 'data', train_size=4, test_size=2, one_class=True)
    with DefaultScope.overwrite_default_scope('mmseg'):
        import mmseg.models  # noqa: F401

        plain = MODELS.build(Config.fromfile(EXAMPLES / 'mmseg_finetune.py').model)
    torch.save({'state_dict': plain.state_dict()}, tmp_path / 'plain.pth')
    options = [f'load_from={tmp_path / "plain.pth"}', 'train_cfg.max_iters=3', 'default_hooks.pskd.interval=1']
    options += ['train_cfg.val_interval=9', 'default_hooks.checkpoint.interval=3', 'train_dataloader.batch_size=2']
    checkpoint = trained('mmseg', 'mmseg_finetune.py', tmp_path / 'data/VOC2007', tmp_path / 'run', *options)
    assert checkpoint['meta']['iter'] == 3


def test_detectron2(voc, tmp_path):
    d2_runs = pytest.importorskip('helpers.detectron2')
    options = [*d2_runs.TINY.split(), 'VOC.ROOT', voc / 'VOC2007', 'OUTPUT_DIR', tmp_path]
    outcome = run_script(EXAMPLES / 'detectron2_train.py', '--config-file', d2_runs.CONFIG, *options, folder=tmp_path)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert 'pskd_soft' in (tmp_path / 'metrics.json').read_text()


def test_fairseq(tmp_path):
    if not find_spec('fairseq'):
        pytest.skip('fairseq is not installed')
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    env = {**os.environ, 'PATH': path, 'PYTHONPATH': str(ROOT / 'plugins'), 'TRAIN_SIZE': '40', 'EPOCHS': '2'}
    command = ['bash', EXAMPLES / 'fairseq_translation.sh', tmp_path / 'words']
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert 'pskd_soft' in outcome.stdout + outcome.stderr
    assert (tmp_path / 'words/run/checkpoint_last.pt').exists()


def test_every_example_is_on_a_page():
    pages = '\n'.join(page.read_text() for page in ROOT.glob('docs/*.md'))
    assert [file.name for file in EXAMPLES.iterdir() if f'<!-- example: {file.name} -->' not in pages] == []
