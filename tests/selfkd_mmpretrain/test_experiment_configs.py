"""Every config of the papers' experiments, built and trained for two steps on images in the data sets' own layout."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mm_runs import ROOT
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

FOLDERS = [ROOT / 'configs/mmpretrain' / method for method in ('pskd', 'cskd', 'frskd')]
CONFIGS = sorted(path for folder in FOLDERS for path in folder.glob('*.py') if path.stem.count('_') == 3)
# Thousands of layers deep or wide: narrower here, with the same options otherwise.
SMALLER = {
    'PyramidNet_CIFAR': {'depth': 20, 'alpha': 24},
    'ResNeXt_CIFAR': {'width_per_group': 8},
    'DenseNet': {'arch': {'growth_rate': 8, 'depths': [2, 2, 2, 2], 'init_channels': 16}},
    'DenseNet_CIFAR': {'arch': {'growth_rate': 8, 'depths': [2, 2, 2, 2], 'init_channels': 16}},
}
rng = np.random.default_rng(0)


def image(path, size=72):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


def lists(root, kind):
    command = [sys.executable, str(ROOT / 'tools/prepare_lists.py'), kind, str(root)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


def cifar100(root):
    folder = root / 'cifar-100-python'
    folder.mkdir(parents=True)
    for part in ('train', 'test'):
        content = {'data': rng.integers(0, 256, (8, 3072), dtype=np.uint8), 'fine_labels': [0, 1, 99, 1] * 2}
        (folder / part).write_bytes(pickle.dumps(content))
    (folder / 'meta').write_bytes(pickle.dumps({'fine_label_names': [f'class{i}' for i in range(100)]}))


def tinyimagenet(root):
    rows = []
    for c in ('n01443537', 'n01629819'):
        for i in range(4):
            image(root / 'train' / c / 'images' / f'{c}_{i}.JPEG')
            image(root / 'val/images' / f'val_{c}{i}.JPEG')
            rows.append(f'val_{c}{i}.JPEG\t{c}\t0\t32\t44\t62')
    (root / 'val/val_annotations.txt').write_text('\n'.join(rows) + '\n')
    lists(root, 'tinyimagenet')
    assert (root / 'train.txt').read_text().split('\n')[4] == 'n01629819/images/n01629819_0.JPEG 1'


def cub200(root):
    names = [f'001.Black_footed_Albatross/a{i}.jpg' for i in range(8)] + [
        f'200.Common_Yellowthroat/b{i}.jpg' for i in range(8)
    ]
    for name in names:
        image(root / 'images' / name)
    (root / 'images.txt').write_text(''.join(f'{i + 1} {name}\n' for i, name in enumerate(names)))
    (root / 'image_class_labels.txt').write_text(''.join(f'{i + 1} {int(n[:3])}\n' for i, n in enumerate(names)))
    (root / 'train_test_split.txt').write_text(''.join(f'{i + 1} {i % 2}\n' for i in range(16)))


def dogs(root):
    from scipy.io import savemat

    for part in ('train', 'test'):
        names = [f'n02085620-Chihuahua/{part}{i}.jpg' for i in range(4)] + [
            f'n02116738-dhole/{part}{i}.jpg' for i in range(4)
        ]
        for name in names:
            image(root / 'Images' / name)
        cells = np.empty((len(names), 1), dtype=object)  # a MATLAB cell array of strings
        cells[:, 0] = names
        savemat(str(root / f'{part}_list.mat'), {'file_list': cells, 'labels': np.array([[1]] * 4 + [[120]] * 4)})
    lists(root, 'dogs')
    assert (root / 'train.txt').read_text().split('\n')[4] == 'n02116738-dhole/train0.jpg 119'


def mit67(root):
    for part in ('Train', 'Test'):
        names = [f'{c}/{part}{i}.jpg' for c in ('airport_inside', 'bakery') for i in range(4)]
        for name in names:
            image(root / 'Images' / name)
        (root / f'{part}Images.txt').write_text('\n'.join(names) + '\n')
    lists(root, 'mit67')


def stanford40(root):
    for part in ('train', 'test'):
        for c in ('applauding', 'waving_hands'):
            names = [f'{c}_{part}{i}.jpg' for i in range(4)]
            for name in names:
                image(root / 'JPEGImages' / name)
            (root / 'ImageSplits').mkdir(exist_ok=True)
            (root / f'ImageSplits/{c}_{part}.txt').write_text('\n'.join(names) + '\n')
    lists(root, 'stanford40')


def imagenet(root):
    for part in ('train', 'val'):
        for c in range(1000):  # MMPretrain wants a folder for each class
            (root / part / f'n{c:08d}').mkdir(parents=True)
        for c in (0, 999):
            for i in range(4):
                image(root / part / f'n{c:08d}' / f'n{c:08d}_{i}.JPEG')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    for make in (cifar100, tinyimagenet, cub200, dogs, mit67, stanford40, imagenet):
        make(root / make.__name__)
    return root


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_two_steps(path, data, tmp_path, monkeypatch):
    monkeypatch.setattr('mmpretrain.datasets.cifar.check_md5', lambda *_: True)
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({'work_dir': str(tmp_path), 'experiment_name': path.stem, 'log_level': 'ERROR'})
    cfg.merge_from_dict(
        {'train_cfg.max_epochs': 1, 'default_hooks.logger.interval': 1, 'default_hooks.checkpoint.interval': 2}
    )
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data / path.stem.split('_')[2])
        for step in loader.dataset.pipeline:  # 224 x 224 takes minutes on a CPU
            if step.type in ('RandomResizedCrop', 'CenterCrop'):
                step.update({'scale' if 'scale' in step else 'crop_size': 64 if 224 in step.values() else 32})
            if step.type == 'ResizeEdge':
                step.scale = 72
    cfg.test_dataloader = cfg.val_dataloader
    cfg.model.backbone.update(SMALLER.get(cfg.model.backbone.type.split('.')[-1], {}))
    if 'DenseNet' in cfg.model.backbone.type:
        cfg.model.head.in_channels = 32
    elif 'Pyramid' in cfg.model.backbone.type:
        cfg.model.head.in_channels = 160
    runner = Runner.from_cfg(cfg)
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner.train()
    assert runner.iter == 2
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    assert not torch.equal(before['head.fc.weight'], runner.model.head.fc.weight)
    assert (
        'calibration/ece' in runner.message_hub.log_scalars or 'val/calibration/ece' in runner.message_hub.log_scalars
    )


def test_every_method_has_its_plain_baseline_beside_it():
    plain = [path for path in CONFIGS if path.stem.endswith('_plain')]
    methods = [path for path in CONFIGS if path not in plain]
    assert len(plain) > 15
    assert len(methods) > 15
    for path in methods:
        assert path.with_name('_'.join(path.stem.split('_')[:3]) + '_plain.py') in plain
        base = Config.fromfile(path.with_name('_'.join(path.stem.split('_')[:3]) + '_plain.py'))
        assert not any('KD' in hook['type'] for hook in base.get('custom_hooks', []))
        assert Config.fromfile(path).train_cfg == base.train_cfg
