"""A ResNet trained in MMPretrain as a detector's backbone."""

import importlib.util
import pickle
import re
import subprocess
import sys

import make_toy_data
import pytest
import torch
from helpers import ROOT
from helpers.mmengine import train
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS

from selfkd_mmpretrain import backbone as tool

PREPROCESSOR = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)


def pretrained(folder, depth, **backbone):
    """Config and checkpoint of a classifier whose batch norms have seen something."""
    cfg = Config(
        dict(
            model=dict(
                type='ImageClassifier',
                backbone=dict(type='ResNet', depth=depth, zero_init_residual=False, **backbone),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(
                    type='LinearClsHead',
                    num_classes=3,
                    in_channels=backbone.get('base_channels', 64) * (8 if depth < 50 else 32),
                ),
            ),
            data_preprocessor=PREPROCESSOR,
        )
    )
    cfg.dump(folder / 'config.py')
    init_default_scope('mmpretrain')  # other tests' runners leave theirs
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 64, 64))
        for name, value in model.named_parameters():
            if '.bn' in name or 'downsample.1' in name:
                value += 0.1 * torch.randn_like(value)
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, folder / 'epoch_1.pth')
    return str(folder / 'epoch_1.pth'), str(folder / 'config.py')


@pytest.mark.parametrize('depth', [18, 50])
def test_mmdet_starts_from_it(tmp_path, depth):
    source, config = pretrained(tmp_path, depth)
    target = tmp_path / 'backbone.pth'
    if depth == 18:
        command = [sys.executable, str(ROOT / 'tools/convert_backbone.py'), source, str(target)]
        outcome = subprocess.run([*command, '--to', 'mmdet', '--config', config], capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stderr[-3000:]
        assert f"checkpoint='{target}'" in outcome.stdout
        assert 'largest relative difference of features' in outcome.stdout
    else:
        found = tool.convert_backbone(source, str(target), to='mmdet', config=config)
        assert found.difference <= 1e-4
    weights = torch.load(target, weights_only=True)['state_dict']
    start = {k[9:]: v for k, v in torch.load(source)['state_dict'].items() if k.startswith('backbone.')}
    assert weights.keys() == start.keys()
    assert all(torch.equal(weights[name], start[name]) for name in start)


def documented_configs():
    """The configs of MMPretrain that the pages give to the tool."""
    # commands.md is written from the commands' help, whose CONFIG is any.
    pages = '\n'.join(page.read_text() for page in ROOT.glob('docs/*.md') if page.name != 'commands.md')
    commands = re.findall(r'selfkd convert-backbone(?:[^\n]|(?<=\\)\n)*', pages)
    found = {re.search(r'--config (\S+)', command)[1] for command in commands}
    return sorted({name.replace('$method', method) for name in found for method in ('baseline', 'pskd')})


@pytest.mark.parametrize('config', documented_configs())
@pytest.mark.parametrize('to', ['mmdet', 'detectron2'])
def test_the_documented_command_on_the_config_it_names(tmp_path, config, to):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    weights = MODELS.build(Config.fromfile(ROOT / config).model).state_dict()
    torch.save({'meta': {}, 'state_dict': weights}, tmp_path / 'epoch.pth')
    target = str(tmp_path / ('backbone.pth' if to == 'mmdet' else 'backbone.pkl'))
    found = tool.convert_backbone(str(tmp_path / 'epoch.pth'), target, to=to, config=str(ROOT / config))
    assert found.depth == (50 if 'crops' in config else 152)
    assert found.difference is None or found.difference <= 1e-4


@pytest.mark.parametrize(
    ('to', 'told'),
    [
        ('mmdet', ['stem_channels=8, base_channels=16']),
        ('detectron2', ['RES2_OUT_CHANNELS: 64', 'WIDTH_PER_GROUP: 16', 'STEM_OUT_CHANNELS: 8']),
    ],
)
def test_narrow_ones(tmp_path, to, told):
    source, config = pretrained(tmp_path, 50, stem_channels=8, base_channels=16)
    target = str(tmp_path / ('b.pth' if to == 'mmdet' else 'b.pkl'))
    found = tool.convert_backbone(source, target, to=to, config=config)
    assert found.difference is None or found.difference <= 1e-4
    assert all(line in found.usage for line in told)


def from_crops(tmp_path, to, target):
    """The weights of a backbone that was trained with PS-KD on crops, and converted."""
    make_toy_data.crops(tmp_path / 'crops', train_size=64, test_size=4)
    config = str(ROOT / 'configs/mmpretrain/pskd/resnet50-w16_1xb50_crops.py')
    cfg = Config.fromfile(config)
    options = {'train_dataloader.batch_size': 32, 'train_cfg.max_epochs': 2, 'log_level': 'ERROR'}
    roots = {f'{part}_dataloader.dataset.data_root': str(tmp_path / 'crops') for part in ('train', 'val', 'test')}
    cfg.merge_from_dict({**options, **roots, 'work_dir': str(tmp_path / 'classifier')})
    train(cfg)
    source = str(tmp_path / 'classifier/epoch_2.pth')
    tool.convert_backbone(source, str(target), to=to, config=config)
    state = torch.load(source)['state_dict']
    return {name[9:]: value for name, value in state.items() if name.startswith('backbone.')}


def test_the_small_protocol_in_mmdetection(voc, tmp_path):
    weights = from_crops(tmp_path, 'mmdet', tmp_path / 'backbone.pth')
    cfg = Config.fromfile(ROOT / 'configs/mmdet/baseline/faster-rcnn_r50-w16_fpn_digits.py')
    options = {
        'model.backbone.init_cfg.checkpoint': str(tmp_path / 'backbone.pth'),
        'train_cfg.max_epochs': 1,
        'train_cfg.val_begin': 9,
        'work_dir': str(tmp_path / 'run'),
        'log_level': 'ERROR',
    }
    roots = {f'{part}_dataloader.dataset.data_root': f'{voc}/' for part in ('train', 'val', 'test')}
    cfg.merge_from_dict({**options, **roots})
    found = train(cfg).model.backbone.state_dict()
    frozen = [name for name in weights if name.startswith(('conv1', 'bn1', 'layer1')) or 'running' in name]
    assert len(frozen) > 100
    assert all(torch.equal(found[name], weights[name]) for name in frozen)
    assert not torch.equal(found['layer4.0.conv1.weight'], weights['layer4.0.conv1.weight'])


def test_the_small_protocol_in_detectron2(voc, tmp_path):
    pytest.importorskip('detectron2', reason='Detectron2 is not installed (docs/detectron2.md)')
    from selfkd_detectron2.train import main

    weights = from_crops(tmp_path, 'detectron2', tmp_path / 'backbone.pkl')
    options = f'VOC.ROOT {voc}/VOC2007 OUTPUT_DIR {tmp_path}/run MODEL.WEIGHTS {tmp_path}/backbone.pkl DATASETS.TEST ()'
    options += ' SOLVER.MAX_ITER 2 SOLVER.STEPS () SOLVER.WARMUP_ITERS 1 SOLVER.IMS_PER_BATCH 2'
    config = str(ROOT / 'configs/detectron2/faster_rcnn_R_50w16_FPN_digits.yaml')
    main(['--config-file', config, *options.split()])
    found = torch.load(tmp_path / 'run/model_final.pth')['model']
    found = {name.removeprefix('backbone.bottom_up.'): value for name, value in found.items()}
    frozen = [name for name in weights if name.startswith(('conv1', 'bn1.running', 'layer1.0.conv'))]
    assert len(frozen) == 6
    assert all(torch.equal(found[tool.detectron2_name(name)], weights[name]) for name in frozen)
    assert not torch.equal(found['res5.0.conv1.weight'], weights['layer4.0.conv1.weight'])


def test_caffe_style_moves_the_stride(tmp_path):
    source, config = pretrained(tmp_path, 50, style='caffe', num_stages=4)
    found = tool.convert_backbone(source, str(tmp_path / 'b.pth'), to='mmdet', config=config)
    assert found.difference <= 1e-4
    assert "style='caffe'" in found.usage
    found = tool.convert_backbone(source, str(tmp_path / 'b.pkl'), to='detectron2', config=config)
    assert 'STRIDE_IN_1X1: True' in found.usage


def test_detectron2_names(tmp_path):
    """Against the names of Detectron2's own ResNet where it is installed, and their known form where it is not."""
    source, config = pretrained(tmp_path, 50)
    found = tool.convert_backbone(source, str(tmp_path / 'r50.pkl'), to='detectron2', config=config)
    with open(tmp_path / 'r50.pkl', 'rb') as file:
        data = pickle.load(file)
    assert data['matching_heuristics'] is True
    names = set(data['model'])
    norm = {f'norm.{part}' for part in ('weight', 'bias', 'running_mean', 'running_var')}
    expected = {f'stem.conv1.{part}' for part in {'weight'} | norm}
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        for block in range(blocks):
            convolutions = ['conv1', 'conv2', 'conv3'] + ['shortcut'] * (block == 0)
            expected |= {f'res{stage}.{block}.{conv}.{part}' for conv in convolutions for part in {'weight'} | norm}
    assert names == expected
    installed = importlib.util.find_spec('detectron2') is not None
    assert (found.difference is not None) == installed
    assert 'STRIDE_IN_1X1: False' in found.usage
    assert 'FORMAT: RGB' in found.usage
    assert 'PIXEL_MEAN: [123.675, 116.28, 103.53]' in found.usage


def test_weights_that_do_not_arrive_are_noticed_and_what_was_there_stays(tmp_path, monkeypatch, capsys):
    source, config = pretrained(tmp_path, 18)
    target = tmp_path / 'b.pth'
    target.write_bytes(b'the old one')
    monkeypatch.setattr(torch, 'save', lambda state, path, save=torch.save: save({'state_dict': {}}, path))
    with pytest.raises(RuntimeError, match='features differ from those of .*: not written'):
        tool.convert_backbone(source, str(target), to='mmdet', config=config)
    with pytest.raises(SystemExit, match='2'):
        tool.main([source, str(target), '--to', 'mmdet', '--config', config])
    assert 'features differ from those' in capsys.readouterr().err
    assert target.read_bytes() == b'the old one'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['b.pth', 'config.py', 'epoch_1.pth']


def test_files_that_cannot_be_read_or_written_end_the_command_with_a_message(tmp_path, capsys):
    source, config = pretrained(tmp_path, 18)
    (tmp_path / 'cut.pth').write_bytes((tmp_path / 'epoch_1.pth').read_bytes()[:-100])
    (tmp_path / 'cut.py').write_text('model = dict(')
    torch.save([1], tmp_path / 'list.pth')
    for name, target, cfg, message in (
        ('none.pth', 'b.pth', config, 'none.pth'),
        ('cut.pth', 'b.pth', config, 'cut.pth: is no checkpoint, or not a whole one'),
        ('list.pth', 'b.pth', config, 'list.pth holds a list instead of a checkpoint'),
        ('epoch_1.pth', 'none/b.pth', config, 'none/b.pth'),
        ('epoch_1.pth', 'b.pth', str(tmp_path / 'cut.py'), 'cut.py: is no config, or not a whole one'),
    ):
        with pytest.raises(SystemExit, match='2'):
            tool.main([str(tmp_path / name), str(tmp_path / target), '--to', 'mmdet', '--config', cfg])
        assert message in capsys.readouterr().err


def test_where_mmdetection_is_not_installed(tmp_path, monkeypatch, capsys):
    source, config = pretrained(tmp_path, 18)
    monkeypatch.setitem(sys.modules, 'mmdet.models.backbones', None)
    with pytest.raises(SystemExit, match='2'):
        tool.main([source, str(tmp_path / 'b.pth'), '--to', 'mmdet', '--config', config])
    assert 'which is not installed here: install MMDetection' in capsys.readouterr().err
    assert not (tmp_path / 'b.pth').exists()


def test_what_cannot_be_converted_is_refused_by_name(tmp_path):
    source, config = pretrained(tmp_path, 18)
    with pytest.raises(ValueError, match='Detectron2 reads such weights from a file that ends in .pkl'):
        tool.convert_backbone(source, str(tmp_path / 'x.pth'), to='detectron2', config=config)
    with pytest.raises(ValueError, match="to: must be 'mmdet' or 'detectron2', got 'other'"):
        tool.convert_backbone(source, str(tmp_path / 'x.pth'), to='other', config=config)
    narrow, narrow_config = pretrained(tmp_path, 18, base_channels=16)
    with pytest.raises(
        ValueError, match='Detectron2 has ResNet-18 with base_channels=64 only, got 16: take a ResNet-50'
    ):
        tool.convert_backbone(narrow, str(tmp_path / 'x.pkl'), to='detectron2', config=narrow_config)
    source, config = pretrained(tmp_path, 18)
    other = Config.fromfile(config)
    for change, message in (
        (dict(type='ResNet_CIFAR'), 'the backbone ResNet_CIFAR is not supported'),
        (dict(deep_stem=True), 'the backbone ResNet with deep_stem is not supported'),
        (dict(depth=34), 'does not hold the backbone of the config'),
    ):
        changed = other.copy()
        changed.model = {**other.model, 'backbone': {**other.model.backbone, **change}}
        changed.dump(tmp_path / 'other.py')
        with pytest.raises(ValueError, match=message):
            tool.convert_backbone(source, str(tmp_path / 'x.pth'), to='mmdet', config=str(tmp_path / 'other.py'))
