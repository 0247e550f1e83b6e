"""FRSKD's segmentation model against its authors' code: networks, losses, gradients, training, images.

Needs the released repository (``SELFKD_RELEASED``), and ``pip install efficientnet_pytorch``, on which it builds. Both
sides compute in float64.
"""

import ast
import importlib.util
import random
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.mmengine import counter
from helpers.released_code import FOLDER, needs
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, load_state_dict
from mmengine.structures import PixelData
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules
from torch import nn

RELEASED = FOLDER / 'FRSKD/segmentation'
pytestmark = needs('FRSKD')
ARCHS = ('b0', 'b1', 'b2')
SECTION = "Segmentation: FRSKD's model, self-teacher and losses"


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


@pytest.fixture(scope='module')
def released():
    """Their package of models and losses."""
    register_all_modules(init_default_scope=False)
    pytest.importorskip('efficientnet_pytorch', reason='the released code builds on the package efficientnet_pytorch')
    spec = importlib.util.spec_from_loader('frskd_segmentation', loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(RELEASED / 'utils')]
    sys.modules['frskd_segmentation'] = package
    return lambda name: importlib.import_module(f'frskd_segmentation.{name}')


@pytest.fixture
def build(released, monkeypatch):
    """Their network and ours with its weights, for one of the three backbones."""
    module = released('efficientdet')
    without_download = module.EfficientNet.from_name
    monkeypatch.setattr(module.EfficientNet, 'from_pretrained', without_download)

    def build(arch):
        torch.manual_seed(0)
        theirs = module.EfficientDet(f'efficientnet-{arch}').double()
        for norm in theirs.modules():
            if isinstance(norm, nn.BatchNorm2d):  # nothing that a network starts with: so that it counts
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, std=0.1)
                nn.init.normal_(norm.running_mean, std=0.1)
                nn.init.uniform_(norm.running_var, 0.5, 1.5)
        cfg = shipped(arch)
        ours = MODELS.build(cfg.model).double()
        copy_weights(theirs, ours)
        return theirs, ours, cfg

    return build


def shipped(arch):
    cfg = Config.fromfile(
        ROOT / f'configs/mmseg/frskd/efficientnet-{arch}_fpn-bifpn_1xb16-60e_voc0712-512x512_frskd.py'
    )
    cfg.model.backbone.init_cfg = None
    return cfg


def modules(theirs, ours):
    """Pairs of modules that hold the same tensors in the same order."""
    yield nn.ModuleList([getattr(theirs, f'layer{i}') for i in range(6)]), ours.backbone
    for name, module in zip(('latlayer3', 'latlayer2', 'latlayer1', 'toplayer'), ours.neck.laterals):
        yield getattr(theirs, name), module
    for name, module in zip(('conv6', 'conv7', 'smooth1', 'smooth2'), [*ours.neck.coarser, *ours.neck.smooth]):
        yield getattr(theirs, name), module
    for layer, other in zip([*theirs.BiFPN1, *theirs.BiFPN2], [*ours.neck.layers, *ours.self_teacher.pyramid]):
        for i, module in enumerate(other.top_down):
            yield getattr(layer, f'conv{i + 2}up'), module
        for i, module in enumerate(other.bottom_up):
            yield getattr(layer, f'conv{i + 3}dw'), module
    for classifier, head in ((theirs.classifier1, ours.decode_head), (theirs.classifier2, ours.self_teacher.head)):
        yield classifier[0], head.conv[0]
        yield classifier[1], head.conv[1]
        yield classifier[3], head.conv_seg


def pairs(theirs, ours):
    """Every tensor of theirs by name, and ours."""
    names = {id(module): name for name, module in theirs.named_modules()}
    for a, b in modules(theirs, ours):
        first, second = a.state_dict(keep_vars=True), b.state_dict(keep_vars=True)
        assert [v.shape for v in first.values()] == [v.shape for v in second.values()]
        for (key, value), other in zip(first.items(), second.values()):
            yield f'{names.get(id(a), "layer")}.{key}', value, other


def copy_weights(theirs, ours):
    with torch.no_grad():
        seen = [id(other.copy_(value)) for _, value, other in pairs(theirs, ours)]
    assert len(set(seen)) == len(theirs.state_dict()) == len(ours.state_dict())  # no tensor of either without a partner


def furthest(theirs, ours, what=lambda value: value):
    """The largest difference of two networks' tensors, each relative to the tensor's largest entry.

    Tensors that are nothing but rounding (the gradient of a bias before a batch norm) are measured by the others: by a
    millionth of the largest entry of all.
    """
    found = []
    for name, value, other in pairs(theirs, ours):
        a, b = what(value), what(other)
        assert (a is None) == (b is None), name
        if a is not None and a.is_floating_point():
            found.append((a.abs().max().item(), (a - b).abs().max().item()))
    floor = 1e-6 * max(size for size, _ in found)
    return max(difference / max(size, floor) for size, difference in found)


def batch(size, images=2, seed=0):
    """Images, labels with an ignored share, and the same labels as MMSegmentation hands them over."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 21, (images, size // 8, size // 8), generator=generator)
    label = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=each[None])) for each in label]
    return torch.randn(images, 3, size, size, generator=generator).double(), label, samples


@pytest.mark.parametrize('arch', ARCHS)
def test_parameters(build, arch):
    theirs, ours, _ = build(arch)
    total = {'b0': 4_327_590, 'b1': 7_127_946, 'b2': 8_592_940}[arch]
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters()) == total


@pytest.mark.parametrize('size', [128, 160])
@pytest.mark.parametrize('arch', ARCHS)
def test_logits_and_maps(build, arch, size, measured):
    """In both modes; maps of even and of odd sizes."""
    theirs, ours, _ = build(arch)
    images, _, _ = batch(size)
    off = 0.0
    for mode in (True, False):
        theirs.train(mode), ours.train(mode)
        with torch.no_grad():
            logits, teacher_logits, maps, refined = theirs(images)
            feats = ours.extract_feat(images)
            own_refined, own_teacher = ours.self_teacher(feats)
            own = ours.decode_head(feats)
        full = [
            nn.functional.interpolate(z, (size, size), mode='bilinear', align_corners=False) for z in (own, own_teacher)
        ]
        for a, b in zip((logits, teacher_logits, *maps, *refined), (*full, *feats, *own_refined)):
            assert a.shape == b.shape
            off = max(off, ((a - b).abs().max() / a.abs().max()).item())
    statistics = furthest(theirs, ours)
    measured(SECTION, f'EfficientNet-{arch}, {size} x {size}', logits_and_maps=off, statistics=statistics)
    assert off < 1e-9
    assert statistics < 1e-9  # batch norm's statistics after the training pass


def losses_of_theirs(released, theirs, images, label, alpha=1.0, beta=50.0):
    distill = released('distill')
    logits, teacher_logits, maps, refined = theirs(images)
    cross_entropy = nn.CrossEntropyLoss(ignore_index=255)
    return {
        'decode.loss_ce': cross_entropy(logits, label),
        'self_teacher.loss_ce': cross_entropy(teacher_logits, label),
        'self_teacher.loss_kd': alpha * distill.DistillKL(SimpleNamespace(temp=1))(logits, teacher_logits),
        'self_teacher.loss_feature': beta * distill.Attention()(maps, refined),
    }


@pytest.mark.parametrize('arch', ARCHS)
def test_losses_and_gradients(build, released, arch, measured):
    """Each loss, the gradient of each with respect to every parameter, and batch norm's statistics."""
    theirs, ours, _ = build(arch)
    images, label, samples = batch(128)
    assert (label == 255).any()
    expected = losses_of_theirs(released, theirs.train(), images, label)
    losses = ours.train()(images, samples, mode='loss')
    assert expected.keys() == {name for name in losses if '.loss' in name}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-9), name
    for name in expected if arch == 'b0' else []:
        theirs.zero_grad(), ours.zero_grad()
        expected[name].backward(retain_graph=True)
        losses[name].backward(retain_graph=True)
        assert furthest(theirs, ours, lambda p: p.grad) < 1e-6, name
    theirs.zero_grad(), ours.zero_grad()
    sum(expected.values()).backward()
    ours.parse_losses(losses)[0].backward()
    terms = max(abs(losses[name].item() / value.item() - 1) for name, value in expected.items())
    gradients = furthest(theirs, ours, lambda p: p.grad)
    measured(SECTION, f'EfficientNet-{arch}, 128 x 128', largest_term=terms, gradients=gradients)
    without = [name for name, p, _ in pairs(theirs, ours) if isinstance(p, nn.Parameter) and p.grad is None]
    assert all(name.startswith('smooth') for name in without)
    assert len(without) == 8  # of two convolutions that are never called
    assert gradients < 1e-6
    assert furthest(theirs, ours) < 1e-9


EPOCHS, BATCHES, SIZE = 4, 4, 64


def released_training(released, monkeypatch, net, lr):
    """Their own training loop over our batches; returns what it logs."""
    wanted = {'sigmoid_rampup', 'get_current_lr', 'adjust_learning_rate', 'train_model_seg'}
    tree = ast.parse((RELEASED / 'main.py').read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    assert {node.name for node in tree.body} == wanted
    for kind in (torch.Tensor, nn.Module):
        monkeypatch.setattr(kind, 'cuda', lambda self, *args, **kwargs: self)
    monkeypatch.setattr(np, 'float', float, raising=False)  # its name in the NumPy that they used

    class Bar(list):
        def set_description(self, text):
            pass

    logged = []
    args = SimpleNamespace(warmup=2, anneal=True, alpha=1.0, beta=50.0, lr=lr, step=[3], temp=1, log_path='none')
    names = {
        'np': np,
        'torch': torch,
        'nn': nn,
        'time': time,
        'tqdm': Bar,
        'pd': SimpleNamespace(DataFrame=lambda logs: SimpleNamespace(to_csv=lambda path: logged.append(logs[-1]))),
        'test_break': False,
        'accum_step': 2.0,
        'criterion_att': released('distill').Attention(),
        'criterion_kd': released('distill').DistillKL(args),
        'EvaluatorSeg': released('metric').EvaluatorSeg,
    }
    exec(compile(tree, 'main.py', 'exec'), names)
    data = {
        'train': [dict(image=images, label=label) for images, label, _ in training_batches()],
        'val': [dict(image=batch(SIZE, 4, 99)[0], label=batch(SIZE, 4, 99)[1])],
    }
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    names['train_model_seg'](net, data, criterion, optimizer, EPOCHS, args)
    return logged


def training_batches():
    return [batch(SIZE, 4, seed) for seed in range(BATCHES)]


@DATASETS.register_module(force=True)
class ReleasedBatches(BaseSegDataset):
    """The same images, one by one."""

    def load_data_list(self):
        shape = dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE))
        batches = [batch(SIZE, 4, 99)] if self.test_mode else training_batches()
        return [
            dict(img=image.permute(1, 2, 0).numpy(), gt_seg_map=each.numpy(), seg_fields=[], **shape)
            for images, label, _ in batches
            for image, each in zip(images, label)
        ]


class Scores(Hook):
    def __init__(self):
        self.values = []

    def after_val_epoch(self, runner, metrics=None):
        self.values.append(metrics['mIoU'] / 100)


def our_training(cfg, model, tmp_path, lr):
    """The shipped schedule, of four epochs, in a Runner; returns the mIoU after each."""
    cfg.model.self_teacher.warmup = 2 / EPOCHS
    cfg.model.data_preprocessor.update(mean=[0.0] * 3, std=[1.0] * 3, bgr_to_rgb=False, size=(SIZE, SIZE))
    for part in ('train', 'val'):
        data = dict(type='ReleasedBatches', test_mode=part == 'val', pipeline=[dict(type='PackSegInputs')])
        data['metainfo'] = dict(classes=[str(i) for i in range(21)])
        cfg[f'{part}_dataloader'] = dict(batch_size=4, dataset=data, sampler=dict(type='DefaultSampler', shuffle=False))
    assert cfg.optim_wrapper.optimizer.lr == 0.01
    cfg.optim_wrapper.optimizer.lr = lr
    assert cfg.param_scheduler[0].milestones == [40]
    cfg.param_scheduler[0].milestones = [3]
    cfg.train_cfg.max_epochs = EPOCHS
    cfg.val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU'])]
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = cfg.visualizer = None
    cfg.update(work_dir=str(tmp_path), experiment_name=f'released{next(counter)}', log_level='ERROR')
    runner = Runner.from_cfg(cfg)
    runner.model.double()
    load_state_dict(runner.model, model.state_dict(), strict=True)
    runner.register_hook(scores := Scores())
    runner.train()
    return runner.model, scores.values


def distance(first, second):
    """Between the parameters of two networks, each given as pairs of tensors of theirs and ours."""
    return sum((a - b).detach().pow(2).sum() for a, b in zip(first, second)).sqrt().item()


def test_training(build, released, monkeypatch, tmp_path, measured):
    """Eight steps in four epochs, two of warm-up, with the loop of each side: every parameter, and mIoU each epoch.

    At a rate at which rounding does not explode (at 1e-4 it does): the control is the released code against itself,
    with one tensor disturbed by 1e-15. Distances are in shares of the way that the parameters have gone.
    """
    lr = 1e-6
    theirs, ours, cfg = build('b0')
    start = [p.clone() for p in theirs.parameters()]
    logged = released_training(released, monkeypatch, theirs, lr)
    way = distance(start, theirs.parameters())
    control, _, _ = build('b0')
    with torch.no_grad():
        control.layer0[0].weight.mul_(1 + 1e-15)
    released_training(released, monkeypatch, control, lr)
    drift = distance(theirs.parameters(), control.parameters()) / way
    trained, scores = our_training(cfg, ours, tmp_path, lr)
    both = [(a, b) for _, a, b in pairs(theirs, trained) if isinstance(a, nn.Parameter)]
    difference = distance(*zip(*both)) / way
    measured(
        'Segmentation: training, in shares of the way of the weights', 'b0, 8 steps', weights=difference, control=drift
    )
    assert way > 1e-3
    assert difference < max(1e-8, 10 * drift) < 1e-4
    assert scores == pytest.approx([row['mIOU'] for row in logged], abs=1e-4)  # of percent with two digits


def images_of(cfg, path, part):
    """What a pipeline of the config makes of an image, normalised as the network gets it, and its labels."""
    cfg.model.data_preprocessor.size = None if part == 'val' else (512, 512)
    pipeline = cfg.train_pipeline if part == 'train' else cfg.val_pipeline
    results = dict(img_path=str(path[0]), seg_map_path=str(path[1]), seg_fields=[], reduce_zero_label=False)
    results['label_map'] = None
    for step in pipeline:
        results = TRANSFORMS.build(step)(results)
    preprocessor = MODELS.build(cfg.model.data_preprocessor).double()
    data = preprocessor(dict(inputs=[results['inputs']], data_samples=[results['data_samples']]), part == 'train')
    return data['inputs'][0], data['data_samples'][0].gt_sem_seg.data[0]


def test_images(released, monkeypatch, tmp_path, measured):
    """Training and validation images, pixel by pixel, where the same numbers are drawn."""
    import make_toy_data

    make_toy_data.voc(tmp_path, train_size=1, test_size=1)
    root = tmp_path / 'VOC2007'
    path = (next((root / 'JPEGImages').glob('*.jpg')), next((root / 'SegmentationClass').glob('*.png')))
    path = (path[0], root / 'SegmentationClass' / f'{path[0].stem}.png')
    sys.modules['utils'] = sys.modules['frskd_segmentation']  # their data set imports by this name
    sys.modules['utils.custom_transform_seg'] = released('custom_transform_seg')
    try:
        dataset = released('dataset')
    finally:
        del sys.modules['utils'], sys.modules['utils.custom_transform_seg']
    for phase, short in (('val', None), ('train', 300), ('train', 512)):
        cfg = shipped('b0')
        theirs = dataset.VOCSegDataset([str(path[0])], [str(path[1])], phase)
        if phase == 'train':  # flip, blur of radius 0.3, a shorter side that leaves no choice of the crop
            monkeypatch.setattr(random, 'random', lambda: 0.3)
            monkeypatch.setattr(random, 'randint', lambda low, high, short=short: short if high > 0 else 0)
            for step in cfg.train_pipeline:
                if step.type == 'RandomFlip':
                    assert step.prob == 0.5
                    step.prob = 1.0
                elif step.type == 'RandomResize':
                    step.scale = [(10**5, short), (10**5, short)]
                elif step.type == 'mmpretrain.GaussianBlur':
                    step.update(prob=1.0, radius=0.3)
                    step.pop('magnitude_range', None)
                    step.pop('magnitude_std', None)
        expected = theirs[0]
        image, label = images_of(cfg, path, phase)
        assert torch.equal(label, expected['label'].long())
        assert (label == 255).any()
        difference = (image - expected['image']).abs().max().item()
        measured('Segmentation: pictures', f'{phase}, shorter side {short or 512}', difference=difference)
        assert difference < 1e-5
