"""The papers' CIFAR networks: their sizes as published, and what tells them from their neighbours."""

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.models.backbones import ResNet_CIFAR

from selfkd_mmpretrain.cifar_backbones import (
    DenseNet_CIFAR,
    PyramidNet_CIFAR,
    ResNeXt_CIFAR,
    WideResNet_CIFAR,
    _ShakeDrop,
)
from selfkd_mmpretrain.preact_resnet import PreActBlock, PreActResNet


@pytest.mark.parametrize(
    ('make', 'channels', 'published'),
    [
        (lambda: PreActResNet(18), 512, 11_217_444),
        (lambda: ResNet_CIFAR(101), 2048, 42_697_380),
        (lambda: DenseNet_CIFAR(arch='121'), 1024, 7_048_548),
        (lambda: ResNeXt_CIFAR(29), 1024, 34_518_948),
        (lambda: PyramidNet_CIFAR(200, 240), 1024, 26_844_952),
        (lambda: PyramidNet_CIFAR(200, 240, shake_drop=0.5), 1024, 26_844_952),
        (lambda: ResNet_CIFAR(18), 512, 11_220_132),
        # FRSKD's released code counts a batch norm of 2 x 128 parameters that its forward pass never uses; ours has
        # none.
        (lambda: WideResNet_CIFAR(16, 2), 128, 703_060 - 256),
    ],
)
def test_parameters_with_100_classes_as_published(make, channels, published):
    assert sum(p.numel() for p in make().parameters()) + (channels + 1) * 100 == published


@pytest.mark.parametrize(
    ('backbone', 'shapes'),
    [
        (DenseNet_CIFAR(arch=dict(growth_rate=4, depths=[1, 1, 1], init_channels=8)), [(9, 4, 4)]),
        (ResNeXt_CIFAR(groups=2, width_per_group=4, out_indices=(0, 2)), [(256, 16, 16), (1024, 4, 4)]),
        (WideResNet_CIFAR(10, 1, out_indices=(0, 1, 2)), [(16, 16, 16), (32, 8, 8), (64, 4, 4)]),
        (PyramidNet_CIFAR(20, 12, out_indices=(0, 1, 2)), [(80, 16, 16), (96, 8, 8), (112, 4, 4)]),
    ],
)
def test_maps_and_gradients(backbone, shapes):
    maps = backbone(torch.randn(2, 3, 16, 16))
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    sum(m.sin().sum() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@torch.no_grad()
def test_preact_shortcut_is_of_the_activated_input():
    """As released: with a branch that gives nothing, a block is the batch norm and ReLU of its input."""
    block = PreActBlock(4, 4, stride=1)
    block.conv2.weight.zero_()
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), F.batch_norm(x, None, None, training=True).relu())


def test_shake_drop_forwards_and_backwards():
    """Disturbed: one factor per image, U(-1, 1) forwards and another U(0, 1) backwards; else the identity."""
    torch.manual_seed(0)
    x = torch.ones(200, 2, 3, 3, requires_grad=True)
    out = _ShakeDrop.apply(x, 1.0)
    out.sum().backward()
    forwards, backwards = out.detach()[:, 0, 0, 0], x.grad[:, 0, 0, 0]
    assert torch.equal(out.detach(), forwards[:, None, None, None].expand_as(out))
    assert -1 <= forwards.min() < -0.9
    assert 0.9 < forwards.max() <= 1
    assert 0 <= backwards.min() < 0.1
    assert 0.9 < backwards.max() <= 1
    assert torch.equal(_ShakeDrop.apply(x, 0.0), x)
    share = sum(not torch.equal(_ShakeDrop.apply(x, 0.3), x) for _ in range(400)) / 400
    assert share == pytest.approx(0.3, abs=0.1)


def test_shake_drop_evaluates_to_the_expectation():
    """The last block is disturbed with the full probability; in evaluation its branch is scaled by 1 - p."""
    torch.manual_seed(0)
    net = PyramidNet_CIFAR(11, 12, shake_drop=0.5)
    drops = [block.drop for stage in net.stages for block in stage]
    assert drops == pytest.approx([0.5 / 3, 1 / 3, 0.5])
    block = net.stages[-1][-1].eval()
    x = torch.randn(2, 96, 4, 4)
    full = block.layers(x)
    shortcut = block(x) - full * 0.5
    assert shortcut[:, 96:].abs().max() < 1e-5


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: WideResNet_CIFAR(15), r'depth: must be 6 n \+ 4'),
        (lambda: PyramidNet_CIFAR(100), r'depth: must be 9 n \+ 2'),
        (lambda: PyramidNet_CIFAR(20, shake_drop=1.0), r'shake_drop: must lie in \[0, 1\)'),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
