"""Every network of the papers against the authors': parameters, initial weights, forward, gradients, batch norm."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.released_code import TO_OURS, cskd, frskd, furthest, gradients, module, needs, ours, pskd, state
from torch import nn

pytestmark = [needs('PS-KD-Pytorch', 'cs-kd', 'FRSKD'), pytest.mark.usefixtures('float64_without_cuda')]


# The authors' network, our config, their names in ours, size of the images, how many.
NETWORKS = {
    'PS-KD: PreAct ResNet-18': (
        pskd('CIFAR_ResNet18_preActBasic', num_classes=100),
        'pskd/preact-resnet18_1xb128-300e_cifar100_plain',
        'preact',
        32,
        2,
    ),
    'PS-KD: "PreAct ResNet-101"': (
        pskd('CIFAR_ResNet101_Bottle', num_classes=100),
        'pskd/resnet101-cifar_1xb128-300e_cifar100_plain',
        'resnet',
        32,
        2,
    ),
    'PS-KD: DenseNet-121': (
        pskd('CIFAR_DenseNet121', num_classes=100, bias=True),
        'pskd/densenet121-cifar_1xb128-300e_cifar100_plain',
        'densenet-cifar',
        32,
        2,
    ),
    'PS-KD: ResNeXt-29 8x64d': (
        pskd('CifarResNeXt', cardinality=8, depth=29, nlabels=100, base_width=64, widen_factor=4),
        'pskd/resnext29-8x64d_1xb128-300e_cifar100_plain',
        'resnext',
        32,
        2,
    ),
    'PS-KD: PyramidNet-200': (
        pskd('PyramidNet', dataset='cifar100', depth=200, alpha=240, num_classes=100, bottleneck=True),
        'pskd/pyramidnet200_1xb128-300e_cifar100_plain',
        'pyramidnet',
        32,
        2,
    ),
    'PS-KD: PyramidNet-200, ShakeDrop': (
        pskd('PyramidNet_ShakeDrop', dataset='cifar100', depth=200, alpha=240, num_classes=100, bottleneck=True),
        'pskd/pyramidnet200-shakedrop_1xb128-300e_cifar100_plain',
        'pyramidnet',
        32,
        2,
    ),
    'PS-KD: ResNet-152, 224': (
        lambda: module('PS-KD-Pytorch', 'models.resnet_imagenet').ResNet('imagenet', 152, 1000, bottleneck=True),
        'pskd/resnet152_8xb16-300e_imagenet_plain',
        'resnet',
        64,
        2,
    ),
    'CS-KD: PreAct ResNet-18': (
        cskd('CIFAR_ResNet18', 100),
        'cskd/preact-resnet18_1xb128-200e_cifar100_plain',
        'preact',
        32,
        2,
    ),
    'CS-KD: DenseNet-121, 32': (
        cskd('CIFAR_DenseNet121', 200),
        'cskd/densenet121-cifar_1xb128-200e_tinyimagenet_plain',
        'densenet-cifar',
        32,
        2,
    ),
    'CS-KD: ResNet-18, 224': (cskd('resnet18', 200), 'cskd/resnet18_1xb32-200e_cub200_plain', 'resnet', 64, 4),
    'CS-KD: DenseNet-121, 224': (
        cskd('densenet121', 200),
        'cskd/densenet121_1xb32-200e_cub200_plain',
        'densenet',
        64,
        2,
    ),
    'FRSKD: ResNet-18': (
        frskd('cifarresnet18', 100),
        'frskd/resnet18-cifar_1xb128-200e_cifar100_plain',
        'resnet',
        32,
        2,
    ),
    'FRSKD: WRN-16-2': (frskd('wrn16x2', 100), 'frskd/wrn16-2_1xb128-200e_cifar100_plain', 'wrn', 32, 4),
    'FRSKD: ResNet-18, 224': (frskd('resnet18', 200), 'frskd/resnet18_1xb32-200e_cub200_plain', 'resnet', 64, 4),
    'FRSKD: ResNet-34, 224': (frskd('resnet34', 1000), 'frskd/resnet34_1xb256-90e_imagenet_plain', 'resnet', 64, 4),
}
PARAMETERS = {  # of the authors' network, as their page of methods counts them
    'PS-KD: PreAct ResNet-18': 11_217_444,
    'PS-KD: "PreAct ResNet-101"': 42_697_380,
    'PS-KD: DenseNet-121': 7_048_548,
    'PS-KD: ResNeXt-29 8x64d': 34_518_948,
    'PS-KD: PyramidNet-200': 26_844_952,
    'FRSKD: ResNet-18': 11_220_132,
    'FRSKD: WRN-16-2': 703_060,
}


def logits_of(net, images):
    """Of ours (a classifier of MMPretrain), of FRSKD's (which returns its maps besides), or of the others'."""
    out = net(images, mode='tensor') if hasattr(net, 'backbone') else net(images)
    return out[1] if isinstance(out, tuple) else out


def step(net, images, labels, seed=1):
    """Logits and loss of a training-mode pass; the network then has gradients and new running statistics."""
    torch.manual_seed(seed)  # ShakeDrop's numbers
    net.train().zero_grad()
    logits = logits_of(net, images)
    F.cross_entropy(logits, labels).backward()
    return logits.detach()


def passes(net, images, labels):
    """What a network computes, by kind: in training mode logits, gradients, running statistics; then evaluation."""
    logits = step(net, images, labels)
    with torch.no_grad():
        evaluation = logits_of(net.eval(), images)
    statistics = {name: value for name, value in state(net).items() if '.running_' in name}
    return {
        'logits': {'': logits},
        'gradients': gradients(net),
        'statistics': statistics,
        'evaluation': {'': evaluation},
    }


def unsettle(net):
    """Batch norms that are not at 1 and 0, so that a weight in the wrong place shows."""
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)


@pytest.mark.parametrize('name', NETWORKS)
def test_network(name, measured):
    make, config, mapping, size, batch = NETWORKS[name]
    mapping = TO_OURS[mapping]
    theirs = make().double()
    count = sum(p.numel() for p in theirs.parameters())
    assert PARAMETERS.get(name, count) == count
    unsettle(theirs)
    mine = ours(config).double()
    mine.load_state_dict(mapping(state(theirs)), strict=False)
    assert mapping(state(theirs)).keys() == state(mine).keys()
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) * 7
    disturbed = copy.deepcopy(theirs)
    with torch.no_grad():
        for p in disturbed.parameters():
            p.mul_(1 + 1e-15 * torch.randn_like(p))
    first, second, third = (passes(net, images, labels) for net in (theirs, mine, disturbed))
    maps = {'gradients': mapping, 'statistics': mapping}
    found = {kind: furthest(maps.get(kind, dict)(named), second[kind]) for kind, named in first.items()}
    control = {kind: furthest(named, third[kind]) for kind, named in first.items()}
    measured(
        'Networks: logits and running statistics in training mode, gradients, logits in evaluation mode',
        name,
        parameters=f'{count:,}',
        **found,
        control=max(control.values()),
    )
    for quantity, difference in found.items():
        assert difference <= max(1e-12, 30 * control[quantity]), (quantity, difference, control)


def spread(net, kind):
    """Root mean square of each layer's weights, and whether they are drawn uniformly (none beyond 2 deviations)."""
    for name, layer in net.named_modules():
        if isinstance(layer, kind):
            yield name, layer, layer.weight.square().mean().sqrt().item()


@pytest.mark.parametrize('name', NETWORKS)
def test_initial_weights(name, measured):
    make, config, *_ = NETWORKS[name]
    theirs, mine = make(), ours(config, initialise=True)
    ratios, weights = [], []
    layers = [list(spread(net, nn.Conv2d)) for net in (theirs, mine)]
    shapes = [sorted(tuple(layer.weight.shape) for _, layer, _ in part) for part in layers]
    assert shapes[0] == shapes[1]
    for shape in sorted(set(shapes[0])):
        pair = [
            torch.cat([m.weight.flatten() for _, m, _ in part if tuple(m.weight.shape) == shape]) for part in layers
        ]
        ratios.append((pair[1].std() / pair[0].std()).item())
        weights.append(len(pair[0]))
        if len(pair[0]) > 1000:
            assert (pair[0].abs().max() > 2 * pair[0].std()) == (
                pair[1].abs().max() > 2 * pair[1].std()
            )  # normal, uniform
    off = sum(abs(ratio - 1) * n for ratio, n in zip(ratios, weights)) / sum(weights)
    (their_linear,), (my_linear,) = ([m for m in net.modules() if isinstance(m, nn.Linear)] for net in (theirs, mine))
    linear = (my_linear.weight.std() / their_linear.weight.std()).item()
    bias = [layer.bias.detach() for layer in (their_linear, my_linear)]
    measured(
        'Initial weights: deviation of ours over theirs less 1 (a draw has noise)',
        name,
        convolutions=off,
        linear_layer=abs(linear - 1),
    )
    assert off < 0.02
    assert linear == pytest.approx(1, abs=0.05)
    assert bool((bias[0] == 0).all()) == bool((bias[1] == 0).all())
    if bias[0].any():
        assert (bias[1].std() / bias[0].std()).item() == pytest.approx(1, abs=0.5)
    norms = [
        {
            (p.min().item(), p.max().item())
            for m in net.modules()
            if isinstance(m, nn.BatchNorm2d)
            for p in (m.weight, m.bias)
        }
        for net in (theirs, mine)
    ]
    assert norms[0] == norms[1] == {(1.0, 1.0), (0.0, 0.0)}


def test_nothing_is_compared_twice():
    assert len({config for _, config, *_ in NETWORKS.values()}) == len(NETWORKS)
    assert all(a[1] != b[1] for a, b in itertools.combinations(NETWORKS.values(), 2))
