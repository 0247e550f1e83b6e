"""What surrounds the methods, against the authors' code: pictures, augmentation, schedules, settings, measures."""

import ast
import re
import shlex
from argparse import ArgumentParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.released_code import FOLDER, definitions, module, needs
from mmengine.config import Config
from mmengine.optim import MultiStepLR
from mmpretrain.registry import MODELS, TRANSFORMS
from PIL import Image

from selfkd import metrics

pytestmark = [needs('PS-KD-Pytorch', 'cs-kd', 'FRSKD'), pytest.mark.usefixtures('float64_without_cuda')]
rng = np.random.default_rng(0)


class Nothing:
    """Stands for torchvision's data sets: keeps the transform and reads no file."""

    def __init__(self, root=None, train=True, transform=None, **kwargs):
        self.transform, self.targets = transform, [0]

    def __len__(self):
        return 1


def stubbed(monkeypatch, namespace, *names):
    for name in names:
        monkeypatch.setattr(namespace, name, Nothing)


def pskd_transforms(data, monkeypatch):
    loaders = module('PS-KD-Pytorch', 'loader.custom_dataloader')
    stubbed(monkeypatch, loaders.custom_datasets, 'Custom_CIFAR10', 'Custom_CIFAR100', 'Custom_ImageFolder')
    args = SimpleNamespace(
        data_type=data, data_path='', rank=0, batch_size=1, workers=0, multiprocessing_distributed=False
    )
    return [loader.dataset.transform for loader in loaders.dataloader(args)[:2]]


def cskd_transforms(data, monkeypatch):
    import torchvision.datasets

    stubbed(monkeypatch, torchvision.datasets, 'CIFAR10', 'CIFAR100', 'ImageFolder')
    loaders = module('cs-kd', 'datasets').load_dataset(data, '', batch_size=1)
    return [loader.dataset.base_dataset.transform for loader in loaders]


def frskd_transforms(data, monkeypatch):
    import torchvision.datasets

    stubbed(monkeypatch, torchvision.datasets, 'CIFAR100', 'ImageFolder')
    return [
        loader.dataset.transform for loader in module('FRSKD', 'classification.dataset').create_loader(1, '', data)[:2]
    ]


DATA = {
    'PS-KD: CIFAR-10': (pskd_transforms, 'cifar10', 'pskd/preact-resnet18_1xb128-300e_cifar10_plain'),
    'PS-KD: CIFAR-100': (pskd_transforms, 'cifar100', 'pskd/preact-resnet18_1xb128-300e_cifar100_plain'),
    'PS-KD: ImageNet': (pskd_transforms, 'imagenet', 'pskd/resnet152_8xb16-300e_imagenet_plain'),
    'CS-KD: CIFAR-100': (cskd_transforms, 'cifar100', 'cskd/preact-resnet18_1xb128-200e_cifar100_plain'),
    'CS-KD: TinyImageNet': (cskd_transforms, 'tinyimagenet', 'cskd/preact-resnet18_1xb128-200e_tinyimagenet_plain'),
    'CS-KD: CUB-200-2011': (cskd_transforms, 'CUB200', 'cskd/resnet18_1xb32-200e_cub200_plain'),
    'CS-KD: Stanford Dogs': (cskd_transforms, 'STANFORD120', 'cskd/resnet18_1xb32-200e_dogs_plain'),
    'CS-KD: MIT67': (cskd_transforms, 'MIT67', 'cskd/densenet121_1xb32-200e_mit67_plain'),
    'FRSKD: CIFAR-100': (frskd_transforms, 'CIFAR100', 'frskd/resnet18-cifar_1xb128-200e_cifar100_plain'),
    'FRSKD: TinyImageNet': (frskd_transforms, 'TINY', 'frskd/resnet18-cifar_1xb128-200e_tinyimagenet_plain'),
    'FRSKD: CUB-200-2011': (frskd_transforms, 'cub_200_2011', 'frskd/resnet18_1xb32-200e_cub200_plain'),
    'FRSKD: Stanford Dogs': (frskd_transforms, 'dogs', 'frskd/resnet18_1xb32-200e_dogs_plain'),
    'FRSKD: MIT67': (frskd_transforms, 'mit67', 'frskd/resnet18_1xb32-200e_mit67_plain'),
    'FRSKD: Stanford40': (frskd_transforms, 'stanford40', 'frskd/resnet18_1xb32-200e_stanford40_plain'),
    'FRSKD: ImageNet': (frskd_transforms, 'imagenet', 'frskd/resnet18_1xb256-90e_imagenet_plain'),
}


def picture(data):
    """Noise at several scales, of CIFAR's, TinyImageNet's or a photograph's size; one without JPEG's losses."""
    height, width = (32, 32) if 'cifar' in data.lower() else (64, 64) if 'tiny' in data.lower() else (333, 500)
    layers = [
        rng.integers(0, 256, (height // k + 1, width // k + 1, 3)).repeat(k, 0).repeat(k, 1)[:height, :width]
        for k in (1, 4, 9)
    ]
    return (sum(layers) / 3).astype(np.uint8)


def our_tensor(cfg, pipeline, image):
    """What a pipeline and the preprocessor make of an RGB picture. CIFAR's are RGB already, files are read as BGR."""
    results = {'img': image if 'CIFAR' in cfg.train_dataloader.dataset.type else image[..., ::-1]}
    results['img_shape'] = image.shape[:2]
    for step in pipeline:
        if step['type'] != 'LoadImageFromFile':
            results = TRANSFORMS.build(step)(results)
    preprocessor = MODELS.build({'type': 'ClsDataPreprocessor', **cfg.data_preprocessor})
    return preprocessor({'inputs': [results['inputs']], 'data_samples': [results['data_samples']]})['inputs'][0]


@pytest.mark.parametrize('name', DATA)
def test_pictures_in_evaluation(name, monkeypatch, measured):
    transforms, data, config = DATA[name]
    _, theirs = transforms(data, monkeypatch)
    cfg = Config.fromfile(ROOT / f'configs/mmpretrain/{config}.py')
    image = picture(data)
    mine = our_tensor(cfg, cfg.val_dataloader.dataset.pipeline, image)
    difference = (theirs(Image.fromarray(image)) - mine).abs().max().item()
    measured('Pictures as the network gets them, of unit deviation', name, evaluation=difference)
    assert difference < 1e-5


@pytest.mark.parametrize('name', DATA)
def test_pictures_in_training(name, monkeypatch, measured):
    """With the random numbers held: one crop, no flip, fixed factors of the colour jitter, fixed lighting."""
    transforms, data, config = DATA[name]
    theirs, _ = transforms(data, monkeypatch)
    cfg = Config.fromfile(ROOT / f'configs/mmpretrain/{config}.py')
    image = picture(data)
    height, width = image.shape[:2]
    kinds = [type(step).__name__ for step in theirs.transforms]
    pipeline = cfg.train_dataloader.dataset.pipeline
    names = [step.type.split('.')[-1] for step in pipeline]
    drawn = {'RandomHorizontalFlip': 'RandomFlip', 'ColorJitter': 'FloatColorJitter'}
    assert [drawn.get(kind, kind) for kind in kinds if kind not in ('ToTensor', 'Normalize')] == [
        n for n in names if n not in ('LoadImageFromFile', 'PackInputs')
    ]
    crop, ours = theirs.transforms[0], TRANSFORMS.build(pipeline[names.index(kinds[0])])
    assert pipeline[names.index('RandomFlip')].prob == theirs.transforms[1].p
    held = {}
    if kinds[0] == 'RandomCrop':
        assert (crop.padding, tuple(crop.size)) == (ours.padding, tuple(ours.crop_size))
        monkeypatch.setattr(type(crop), 'get_params', lambda *args: (3, 5, 32, 32))
        held['rand_crop_params'] = lambda img: (3, 5, 32, 32)
    else:
        assert (tuple(crop.scale), tuple(crop.ratio)) == (ours.crop_ratio_range, ours.aspect_ratio_range)
        box = (height // 8, width // 5, height * 3 // 4, width * 3 // 4)  # to be made smaller
        monkeypatch.setattr(type(crop), 'get_params', lambda *args: box)
        held['rand_crop_params'] = lambda img: box
    monkeypatch.setattr(type(theirs.transforms[1]), 'forward', lambda self, image: image)
    results = {
        'img': image if 'CIFAR' in cfg.train_dataloader.dataset.type else image[..., ::-1],
        'img_shape': (height, width),
    }
    if 'ColorJitter' in kinds:
        jitter, lighting = theirs.transforms[kinds.index('ColorJitter')], theirs.transforms[kinds.index('Lighting')]
        our_jitter = TRANSFORMS.build(pipeline[names.index('FloatColorJitter')])
        assert our_jitter.strengths == {k: getattr(jitter, k) for k in ('brightness', 'contrast', 'saturation')}
        # Theirs mixes with the other picture by -0.3, 0.2, 0.1; ours keeps one less that of the distance from it.
        shares = iter([-0.3, 0.2, 0.1])
        random = SimpleNamespace(uniform=lambda low, high: next(shares), shuffle=lambda items: None)
        monkeypatch.setitem(type(jitter).__call__.__globals__, 'random', random)
        held['_draw'] = lambda: [('brightness', 1.3), ('contrast', 0.8), ('saturation', 0.9)]
        alpha = np.array([0.11, -0.07, 0.05])
        monkeypatch.setattr(torch.Tensor, 'normal_', lambda self, mean, std: self.copy_(torch.as_tensor(alpha)))
        monkeypatch.setattr(np.random, 'normal', lambda mean, std, size: alpha)
        assert TRANSFORMS.build(pipeline[names.index('Lighting')]).alphastd == lighting.alphastd
    for step in pipeline:
        if step.type in ('LoadImageFromFile', 'RandomFlip'):
            continue
        transform = TRANSFORMS.build(step)
        for name_of, value in held.items():
            if name_of in vars(type(transform)):
                setattr(transform, name_of, value)
        results = transform(results)
    preprocessor = MODELS.build({'type': 'ClsDataPreprocessor', **cfg.data_preprocessor})
    mine = preprocessor({'inputs': [results['inputs']], 'data_samples': [results['data_samples']]})['inputs'][0]
    difference = (theirs(Image.fromarray(image)) - mine).abs().max().item()
    measured('Pictures as the network gets them, of unit deviation', name, training=difference)
    assert difference < 1e-5


def arguments(repository, file, command):
    """What a script's parser makes of a command line: its add_argument calls, without the rest of the script."""
    parser = ArgumentParser()
    for node in ast.walk(ast.parse((FOLDER / repository / file).read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, 'attr', None) == 'add_argument':
            call = ast.Call(
                ast.Attribute(ast.Name('parser', ast.Load()), 'add_argument', ast.Load()), node.args, node.keywords
            )
            eval(compile(ast.fix_missing_locations(ast.Expression(call)), file, 'eval'), {'parser': parser})
    return parser.parse_known_args(command)[0]


def optimizer_options(repository, file, args):
    for node in ast.walk(ast.parse((FOLDER / repository / file).read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, 'attr', None) == 'SGD':
            return {k.arg: eval(compile(ast.Expression(k.value), file, 'eval'), {'args': args}) for k in node.keywords}
    raise AssertionError(f'{file}: no SGD')


def commands(repository, page, script):
    """The command lines of a page, without the program."""
    text = (FOLDER / repository / page).read_text().replace('\\\n', ' ')
    lines = [line for line in text.splitlines() if script in line and '--' in line]
    return [shlex.split(re.sub(r"'<[^']*>'|~/", 'x', line.split(script)[1]).replace('`', '')) for line in lines]


def settings(config):
    cfg = Config.fromfile(ROOT / f'configs/mmpretrain/{config}.py')
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.type == 'SGD'
    return cfg, {k: optimizer[k] for k in ('lr', 'momentum', 'weight_decay')}, optimizer.nesterov


def rates(config):
    """The rate of every epoch, by MMEngine's scheduler."""
    cfg, options, _ = settings(config)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=options['lr'])
    scheduler = MultiStepLR(optimizer, **{k: v for k, v in cfg.param_scheduler.items() if k != 'type'})
    found = []
    for _ in range(cfg.train_cfg.max_epochs):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    'config',
    ['pskd/preact-resnet18_1xb128-300e_cifar100_pskd', 'pskd/resnet152_8xb16-300e_imagenet_pskd'],
)
def test_pskd_command_line(config):
    """One command line, for CIFAR-100 and ImageNet."""
    args = arguments('PS-KD-Pytorch', 'main.py', commands('PS-KD-Pytorch', 'README.md', 'main.py')[0])
    cfg, options, nesterov = settings(config)
    theirs = optimizer_options('PS-KD-Pytorch', 'main.py', args)
    assert theirs == {**options, 'nesterov': nesterov}
    assert args.end_epoch == cfg.train_cfg.max_epochs
    assert args.alpha_T == cfg.default_hooks.pskd.alpha
    gpus = int(config.split('_')[1].split('xb')[0])
    assert args.batch_size == gpus * cfg.train_dataloader.batch_size
    adjust = definitions('PS-KD-Pytorch', 'main.py', ['adjust_learning_rate'])['adjust_learning_rate']
    optimizer, expected = torch.optim.SGD([torch.zeros(1)], lr=1.0), []
    for epoch in range(args.end_epoch):
        adjust(optimizer, epoch, args)
        expected.append(optimizer.param_groups[0]['lr'])
    assert rates(config) == pytest.approx(expected)


@pytest.mark.parametrize(
    ('line', 'config'),
    [
        (0, 'cskd/preact-resnet18_1xb128-200e_cifar100_cskd'),
        (1, 'cskd/resnet18_1xb32-200e_cub200_cskd'),
    ],
)
def test_cskd_command_line(line, config):
    args = arguments('cs-kd', 'train.py', commands('cs-kd', 'README.md', 'train.py')[line])
    cfg, options, nesterov = settings(config)
    args.lr = float(args.lr)
    assert {**optimizer_options('cs-kd', 'train.py', args), 'nesterov': False} == {**options, 'nesterov': nesterov}
    hook = cfg.default_hooks.cskd
    assert (args.lamda, args.temp) == (hook.weight, hook.temperature)
    assert (args.epoch, args.batch_size) == (cfg.train_cfg.max_epochs, cfg.train_dataloader.batch_size)
    adjust = definitions('cs-kd', 'train.py', ['adjust_learning_rate'], args=args)['adjust_learning_rate']
    optimizer, expected = torch.optim.SGD([torch.zeros(1)], lr=args.lr), []
    for epoch in range(args.epoch):
        expected.append(optimizer.param_groups[0]['lr'])
        adjust(optimizer, epoch)
    assert rates(config) == pytest.approx(expected)


@pytest.mark.parametrize(('line', 'variant'), enumerate(['', '-sla', '-mixup', '-cutmix']))
def test_frskd_command_line(line, variant):
    args = arguments('FRSKD', 'classification/main.py', commands('FRSKD', 'classification/README.md', 'main.py')[line])
    config = f'frskd/resnet18-cifar_1xb128-200e_cifar100_frskd{variant}'
    cfg, options, nesterov = settings(config)
    theirs = optimizer_options('FRSKD', 'classification/main.py', args)
    assert {**theirs, 'nesterov': False} == {**options, 'nesterov': nesterov}
    teacher = cfg.model.self_teacher
    assert (args.alpha, args.beta, args.temperature) == (teacher.alpha, teacher.beta, teacher.get('temperature', 4.0))
    assert (args.width, args.depth, args.repeat) == tuple(
        teacher.get(k, v) for k, v in dict(width=2, depth=2, repeats=1).items()
    )
    assert args.aux_lamb == teacher.get('sla', 0)
    augment = cfg.model.get('train_cfg', {}).get('augments', dict(type='none', alpha=0.0))
    assert (args.aug, args.aug_a) == (augment['type'].lower(), augment['alpha'])
    assert (args.epoch, args.batch_size) == (cfg.train_cfg.max_epochs, cfg.train_dataloader.batch_size)
    optimizer, expected = torch.optim.SGD([torch.zeros(1)], lr=args.lr), []
    step = module('FRSKD', 'classification.utils').lr_scheduler(
        optimizer, args.scheduler, args.schedule, args.lr_decay, args.epoch
    )
    for _ in range(args.epoch):
        expected.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        step.step()
    assert rates(config) == pytest.approx(expected)


def test_measures(measured):
    theirs = module('PS-KD-Pytorch', 'utils.metric').metric_ece_aurc_eaurc
    probs = torch.randn(500, 10).mul(3).softmax(1)
    labels = torch.where(torch.rand(500) < 0.7, probs.argmax(1), torch.randint(10, (500,)))
    expected = theirs(probs.numpy(), labels.numpy(), bin_size=0.1)
    found = (
        100 * metrics.calibration_error(probs, labels),
        1000 * metrics.aurc(probs, labels),
        1000 * metrics.excess_aurc(probs, labels),
    )
    for name, a, b in zip(('ECE', 'AURC', 'E-AURC'), expected, found):
        measured('Measures', f'PS-KD: {name}', difference=abs(a - b))
        assert b == pytest.approx(a, rel=1e-9)
