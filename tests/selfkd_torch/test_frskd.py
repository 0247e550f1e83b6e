"""FRSKD in a loop of one's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.loops import network, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from selfkd_torch import FRSKD


def test_frskd_on_a_torchvision_network():
    models = pytest.importorskip('torchvision.models', reason='torchvision is not installed')
    torch.manual_seed(0)
    model = models.resnet18(num_classes=5)
    names = list(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    frskd = FRSKD(model, example=torch.zeros(1, 3, 64, 64))
    assert frskd.layers == ['layer1', 'layer2', 'layer3', 'layer4']
    assert frskd.self_teacher.fc.out_features == 5
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


def test_logs_are_the_weighted_terms_of_a_real_loop():
    torch.manual_seed(0)
    stage = lambda c_in, c_out: nn.Sequential(nn.Conv2d(c_in, c_out, 3, 2, 1), nn.ReLU())  # noqa: E731
    model = nn.Sequential(stage(3, 4), stage(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    frskd = FRSKD(model, ['0', '1'], num_classes=5, alpha=3.0, beta=50.0, temperature=2.0)
    maps, steps = {}, []
    for layer in (0, 1):
        model[layer].register_forward_hook(lambda module, args, output, layer=layer: maps.update({layer: output}))

    def attention(feat):
        return F.normalize(feat.pow(2).mean(1).flatten(1))

    def loss_of(logits, labels):
        loss = frskd.loss(logits, labels)
        with torch.no_grad():
            refined, teacher = frskd.self_teacher(list(maps.values()))
            p, q = (z.div(2).softmax(1) for z in (teacher, logits))
            expected = {
                'loss_teacher': F.cross_entropy(teacher, labels),
                'loss_kd': 3 * 4 * (p * (p / q).log()).sum(1).mean(),
                'loss_feature': 50
                * sum((attention(f) - attention(t)).pow(2).mean() for f, t in zip(maps.values(), refined)),
            }
            torch.testing.assert_close(frskd.logs, expected)
            torch.testing.assert_close(loss.detach(), F.cross_entropy(logits, labels) + sum(expected.values()))
        steps.append(frskd.logs)
        return loss

    data = TensorDataset(torch.randn(12, 3, 16, 16), torch.arange(12) % 5)
    train(model, DataLoader(data, batch_size=6), loss_of, epochs=2)
    assert len(steps) == 4
    assert not any(value.requires_grad for step in steps for value in step.values())


@pytest.mark.parametrize(
    ('layers', 'example', 'message'),
    [
        (['layer1'], None, 'layers must name two or more'),
        (['0', '1'], None, 'does not take'),
        (None, torch.zeros(3, 64), 'feature maps .* of two sizes or more, and the modules of Sequential give 0'),
        (['0', '1'], torch.zeros(3, 64), r'must give feature maps \[B, C, H, W\], fine to coarse, got 0: \(3, 32\)'),
    ],
)
def test_layers_that_cannot_work_are_refused(layers, example, message):
    with pytest.raises(ValueError, match=message):
        FRSKD(network(), layers, 10, example=example)
