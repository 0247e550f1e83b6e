"""FRSKD in a loop of one's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.loops import network

from selfkd_torch import FRSKD


def test_frskd_on_a_torchvision_network():
    models = pytest.importorskip('torchvision.models', reason='torchvision is not installed')
    torch.manual_seed(0)
    model = models.resnet18(num_classes=5)
    names = list(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    frskd = FRSKD(model, ['layer1', 'layer2', 'layer3', 'layer4'], num_classes=5, example=torch.zeros(1, 3, 64, 64))
    assert list(model.state_dict()) == names
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(random, torch.random.get_rng_state())  # only the self-teacher's weights were drawn
    optimizer = torch.optim.SGD([*model.parameters(), *frskd.parameters()], lr=0.001)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    losses = []
    for _ in range(3):
        logits = model(images)
        loss = frskd.loss(logits, labels)
        assert loss > F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in frskd.parameters())
    assert losses[-1] < losses[0]
    with pytest.raises(RuntimeError, match=r"FRSKD: \['layer1', .* did not run since the last loss"):
        frskd.loss(logits, labels)
    with torch.no_grad():
        model.eval()(images)
    assert not frskd._feats
    models.resnet18(num_classes=5).load_state_dict(model.state_dict(), strict=True)
    state = frskd.state_dict()
    frskd.load_state_dict(state)


@pytest.mark.parametrize(
    ('layers', 'example', 'message'),
    [
        (['layer1'], None, 'layers must name two or more'),
        (['0', '1'], None, 'does not take'),
        (['0', '1'], torch.zeros(3, 64), r'must give feature maps \[B, C, H, W\], fine to coarse, got 0: \(3, 32\)'),
    ],
)
def test_layers_that_cannot_work_are_refused(layers, example, message):
    with pytest.raises(ValueError, match=message):
        FRSKD(network(), layers, 10, example=example)
