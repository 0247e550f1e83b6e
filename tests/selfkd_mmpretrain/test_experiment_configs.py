"""Every config of the papers' experiments: initialised as released, trained for two steps on images in the data sets'
own layout; pictures prepared as the released code does."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import TRANSFORMS
from PIL import Image
from scipy.io import loadmat
from torchvision import transforms

from selfkd_mmpretrain.data import SVHN, FloatColorJitter

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


def cifar10(root):
    folder = root / 'cifar-10-batches-py'
    folder.mkdir(parents=True)
    sizes = {**{f'data_batch_{i}': 2 if i < 4 else 1 for i in range(1, 6)}, 'test_batch': 8}
    for name, size in sizes.items():
        content = {
            'data': rng.integers(0, 256, (size, 3072), dtype=np.uint8),
            'labels': [9, 0, 3, 3, 1, 2, 5, 7][:size],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': [f'class{i}' for i in range(10)]}))


def svhn(root):
    from scipy.io import savemat

    root.mkdir(parents=True)
    images = rng.integers(0, 256, (32, 32, 3, 8), dtype=np.uint8)
    savemat(str(root / 'test_32x32.mat'), {'X': images, 'y': np.array([[10], [1], [9], [10]] * 2)})


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
    for make in (cifar10, cifar100, svhn, tinyimagenet, cub200, dogs, mit67, stanford40, imagenet):
        make(root / make.__name__)
    return root


class InitialWeights(Hook):
    """What training starts from: after the Runner's init_weights, before the first step."""

    def before_train(self, runner):
        self.weights = {name: p.detach().clone() for name, p in runner.model.named_parameters()}


def shrink(cfg, folder):
    """Two steps on a CPU, of the same kind: fewer and smaller images, narrower networks."""
    cfg.merge_from_dict({'train_cfg.max_epochs': 1, 'default_hooks.logger.interval': 1, 'log_level': 'ERROR'})
    cfg.merge_from_dict({'default_hooks.checkpoint.interval': 2})
    if 'pskd' in cfg.default_hooks:  # it learns from the epoch before
        cfg.train_cfg.max_epochs, cfg.train_dataloader.num_batch_per_epoch = 2, 1
    # At the papers' rates two steps on noise may leave the range of numbers, depending on the processor's rounding.
    cfg.optim_wrapper.optimizer.lr = 1e-3
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(folder)
        for step in loader.dataset.pipeline:  # 224 x 224 takes minutes on a CPU
            if step.type in ('RandomResizedCrop', 'CenterCrop'):
                step.update({'scale' if 'scale' in step else 'crop_size': 64 if 224 in step.values() else 32})
            if step.type == 'ResizeEdge':
                step.scale = 72
    cfg.test_dataloader = cfg.val_dataloader
    backbone = cfg.model.backbone
    backbone.update(SMALLER.get(backbone.type.split('.')[-1], {}))
    if 'DenseNet' in backbone.type:
        cfg.model.head.in_channels = 32
    elif 'Pyramid' in backbone.type:
        cfg.model.head.in_channels = 160
    elif backbone.get('depth') == 152:
        backbone.depth = 50


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_two_steps(path, data, tmp_path, monkeypatch):
    monkeypatch.setattr('mmpretrain.datasets.cifar.check_md5', lambda *_: True)
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({'work_dir': str(tmp_path), 'experiment_name': path.stem})
    shrink(cfg, data / path.stem.split('_')[2])
    runner = Runner.from_cfg(cfg)
    initial = InitialWeights()
    runner.register_hook(initial)
    runner.train()
    assert runner.iter == 2
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    assert not torch.equal(initial.weights['head.fc.weight'], runner.model.head.fc.weight)
    assert any('ece' in name for name in runner.message_hub.log_scalars)
    assert_initialised(path.stem.split('_')[0], runner.model, initial.weights)


# As released (each authors' repository): the rule of the convolutions, of the linear layers, and whether these start
# with a bias of 0.
INITIALISATION = {
    'preact-resnet18': ('torch', 'torch', False),
    'resnet101-cifar': ('torch', 'torch', False),
    'resnet18-cifar': ('torch', 'torch', False),
    'densenet121-cifar': ('torch', 'torch', False),
    'resnext29-8x64d': ('fan_out', 'fan_in', True),
    'pyramidnet200': ('fan_out', 'torch', False),
    'pyramidnet200-shakedrop': ('fan_out', 'torch', False),
    'wrn16-2': ('fan_out', 'torch', True),
    'resnet18': ('fan_out', 'torch', False),
    'resnet34': ('fan_out', 'torch', False),
    'resnet152': ('fan_out', 'torch', False),
    'densenet121': ('fan_in', 'torch', True),
}


def deviation(weight, rule):
    """Of kaiming normal by either fan, or of torch's own U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))."""
    fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(weight)
    return {'torch': (3 * fan_in) ** -0.5, 'fan_in': (2 / fan_in) ** 0.5, 'fan_out': (2 / fan_out) ** 0.5}[rule]


def assert_initialised(network, model, initial):
    convolution, linear, zero_bias = INITIALISATION[network]
    weights = {name: w for name, w in initial.items() if name.startswith(('backbone.', 'head.'))}
    # All layers in one number: each by itself has sampling noise.
    scaled = torch.cat([(w / deviation(w, convolution)).flatten() for w in weights.values() if w.dim() == 4])
    assert scaled.square().mean().sqrt().item() == pytest.approx(1, abs=0.02)
    fc = weights['head.fc.weight']
    assert fc.std().item() == pytest.approx(deviation(fc, linear), rel=0.1)
    assert bool((weights['head.fc.bias'] == 0).all()) == zero_bias


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_out_of_distribution_config(name, data, tmp_path, monkeypatch):
    monkeypatch.setattr('mmpretrain.datasets.cifar.check_md5', lambda *_: True)
    cfg = Config.fromfile(ROOT / f'configs/mmpretrain/ood/preact-resnet18_{name}-svhn.py')
    cfg.merge_from_dict({'work_dir': str(tmp_path), 'experiment_name': f'ood_{name}', 'log_level': 'ERROR'})
    cfg.model.backbone.base_channels, cfg.model.head.in_channels = 4, 32
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    for part, folder in zip(cfg.test_dataloader.dataset.datasets, (name, 'svhn')):
        part.data_root = str(data / folder)
    runner = Runner.from_cfg(cfg)
    measures = runner.test()
    assert sorted(measures) == ['ood/aupr', 'ood/auroc', 'ood/fpr95']
    dataset = runner.test_dataloader.dataset
    assert [int(dataset[i]['data_samples'].gt_label) for i in range(len(dataset))][8:] == [-1] * 8


def test_svhn_reads_the_authors_file(data):
    dataset = SVHN(str(data / 'svhn'), pipeline=[])
    assert len(dataset) == 8
    assert [dataset[i]['gt_label'] for i in range(4)] == [0, 1, 9, 0]
    content = loadmat(str(data / 'svhn/test_32x32.mat'))
    assert np.array_equal(dataset[3]['img'], content['X'][..., 3])
    with pytest.raises(FileNotFoundError, match=r'docs/data\.md'):
        SVHN(str(data / 'svhn'), split='extra', pipeline=[])


def photograph(height, width):
    """Noise at every scale: it tells filters apart."""
    noise = sum(
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (height // k, width // k, 3), dtype=np.uint8)).resize((width, height)),
            float,
        )
        for k in (1, 4, 16)
    )
    return (noise / 3).astype(np.uint8)


def pipeline_of(path, part):
    steps = Config.fromfile(ROOT / 'configs/mmpretrain/_base_' / path)[f'{part}_dataloader'].dataset.pipeline
    return [TRANSFORMS.build(step) for step in steps if step.type not in ('LoadImageFromFile', 'PackInputs')]


@pytest.mark.parametrize(
    ('path', 'theirs'),
    [
        ('imagenet.py', [transforms.Resize(256), transforms.CenterCrop(224)]),
        ('imagenet_jitter.py', [transforms.Resize(256), transforms.CenterCrop(224)]),
        ('cub200.py', [transforms.Resize(256), transforms.CenterCrop(224)]),
        ('tinyimagenet.py', [transforms.Resize(32)]),
        ('tinyimagenet_frskd.py', [transforms.Resize(32)]),
    ],
)
@pytest.mark.parametrize('size', [(333, 500), (500, 375)])
def test_pictures_are_prepared_as_released(path, theirs, size):
    """The released code's transforms are torchvision's on PIL images."""
    image = photograph(64, 64) if 'tiny' in path else photograph(*size)
    results = {'img': image[..., ::-1], 'img_shape': image.shape[:2]}
    for step in pipeline_of(path, 'val'):
        results = step(results)
    expected = np.asarray(transforms.Compose(theirs)(Image.fromarray(image)))
    assert np.array_equal(results['img'][..., ::-1], expected)


@pytest.mark.parametrize(('path', 'size'), [('imagenet.py', 224), ('imagenet_jitter.py', 224), ('tinyimagenet.py', 32)])
def test_training_crops_are_resized_as_released(path, size):
    image = photograph(120, 90)
    crop = pipeline_of(path, 'train')[0]
    assert (crop.crop_ratio_range, crop.aspect_ratio_range) == ((0.08, 1.0), (3 / 4, 4 / 3))  # torchvision's defaults
    crop.rand_crop_params = lambda img: (10, 20, 77, 61)  # top, left, height, width
    ours = crop({'img': image[..., ::-1], 'img_shape': image.shape[:2]})['img'][..., ::-1]
    theirs = transforms.functional.resized_crop(Image.fromarray(image), 10, 20, 77, 61, [size, size])
    assert np.array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize('name', ['brightness', 'contrast', 'saturation'])
def test_float_color_jitter(name, monkeypatch):
    """A factor on the distance from black, from the mean grey, from the pixel's grey: nothing clipped or rounded."""
    image = photograph(20, 30)
    monkeypatch.setattr(np.random, 'uniform', lambda low, high: {0.6: 0.7, 1.0: 1.0}[low])
    out = FloatColorJitter(**{name: 0.4})({'img': image})['img']
    grey = image @ np.array([0.114, 0.587, 0.299])
    other = {'brightness': 0, 'contrast': grey.mean(), 'saturation': grey[..., None]}[name]
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, other + 0.7 * (image - other), atol=1e-3)


def test_float_color_jitter_draws_each_time_anew():
    jitter = FloatColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
    orders = {tuple(name for name, _ in jitter._draw()) for _ in range(100)}
    factors = np.array([[factor for _, factor in jitter._draw()] for _ in range(300)])
    assert len(orders) == 6
    assert factors.min() == pytest.approx(0.6, abs=0.02)
    assert factors.max() == pytest.approx(1.4, abs=0.02)
    assert jitter({'img': np.full((4, 4, 3), 255, np.uint8)})['img'].std() < 1e-4
    with pytest.raises(ValueError, match='contrast must be at least 0'):
        FloatColorJitter(contrast=-0.1)


def test_every_method_has_its_plain_baseline_beside_it():
    plain = [path for path in CONFIGS if path.stem.endswith('_plain')]
    methods = [path for path in CONFIGS if path not in plain]
    assert len(plain) > 15
    assert len(methods) > 15
    for path in methods:
        assert path.with_name('_'.join(path.stem.split('_')[:3]) + '_plain.py') in plain
        base = Config.fromfile(path.with_name('_'.join(path.stem.split('_')[:3]) + '_plain.py'))
        assert not {'pskd', 'cskd'} & set(base.default_hooks)
        assert Config.fromfile(path).train_cfg == base.train_cfg
