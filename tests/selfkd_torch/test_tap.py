"""Training code that cannot be edited learns from its own past."""

import pytest
import torch
import torch.nn.functional as F
from helpers.loops import EPOCHS, LogSoftmaxLoss, loader_of, network, train
from torch import nn

from selfkd_torch import PSKD


def torchvision_style_epoch(model, criterion, optimizer, data_loader):
    """As torchvision's references/classification/train.py: nothing in it knows of self-distillation."""
    model.train()
    for _, (image, target) in enumerate(data_loader):
        output = model(image)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.inference_mode():
            F.cross_entropy(output, target)  # for the log


@pytest.mark.parametrize(
    ('criterion', 'smoothing'), [(nn.CrossEntropyLoss(label_smoothing=0.1), 0.1), (LogSoftmaxLoss(), 0.1)]
)
def test_tap_on_code_that_cannot_be_edited(digits, criterion, smoothing):
    model, explicit = network(), network()
    pskd = PSKD(loader_of(digits), num_classes=10, max_epochs=EPOCHS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    torch.manual_seed(1)
    for _ in range(EPOCHS):
        with pskd.tap(None if isinstance(criterion, nn.CrossEntropyLoss) else criterion):
            torchvision_style_epoch(model, criterion, optimizer, pskd.batches())
    other = PSKD(loader_of(digits), num_classes=10, max_epochs=EPOCHS)
    train(explicit, other.batches(), lambda logits, y: other.loss(logits, y, label_smoothing=smoothing))
    for name, value in explicit.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert not criterion._forward_hooks


def test_an_explicit_loss_inside_a_tap_counts_once(digits):
    tapped, plain = (PSKD(loader_of(digits), 10, alpha=0.8, max_epochs=EPOCHS) for _ in range(2))
    options = dict(weight=torch.linspace(0.5, 2, 10))
    with tapped.tap():
        losses = train(network(), tapped.batches(), lambda x, y: tapped.loss(x, y, **options))
    assert losses == train(network(), plain.batches(), lambda x, y: plain.loss(x, y, **options))


@pytest.mark.parametrize('teacher', ['bank', 'snapshot'])
def test_nll_loss_of_log_probs_is_softened_as_the_cross_entropy_is(digits, teacher):
    def losses(loss_of):
        model = network()
        options = dict(teacher=teacher, model=model) if teacher == 'snapshot' else {}
        pskd = PSKD(loader_of(digits), max_epochs=EPOCHS, **options)
        with pskd.tap():
            return train(model, pskd.batches(), loss_of)

    found = losses(lambda x, y: F.nll_loss(F.log_softmax(x, 1), y, reduction='sum') / len(y))
    assert found == pytest.approx(losses(F.cross_entropy), rel=1e-4)
    assert found[3:] != pytest.approx(train(network(), loader_of(digits), F.cross_entropy)[3:], rel=1e-2)
    with pytest.raises(ValueError, match='no log-probabilities'):
        losses(F.nll_loss)


def test_timms_losses(digits):
    loss = pytest.importorskip('timm.loss', reason='timm is not installed')
    for criterion, target in (
        (loss.LabelSmoothingCrossEntropy(0.1), lambda y: y),
        (loss.SoftTargetCrossEntropy(), lambda y: F.one_hot(y, 10).float()),
    ):
        model = network()
        pskd = PSKD(loader_of(digits), alpha=0.8, max_epochs=2, teacher='snapshot', model=model)
        plain, tapped = [], []
        for _ in range(2):
            with pskd.tap(criterion):
                for x, y in pskd.batches():
                    torch.manual_seed(0)
                    logits = model(x)
                    tapped.append(criterion(logits, target(y)).item())
                    plain.append(criterion.forward(logits, target(y)).item())
        assert tapped[:3] == plain[:3]
        assert all(abs(a - b) > 1e-3 for a, b in zip(tapped[3:], plain[3:]))


def test_a_tap_that_does_not_fire_is_an_error(digits):
    model, pskd = network(), PSKD(loader_of(digits), num_classes=10, max_epochs=2)
    with pytest.raises(RuntimeError, match='a batch was trained on without pskd.loss'), pskd.tap():
        torchvision_style_epoch(model, LogSoftmaxLoss(), torch.optim.SGD(model.parameters(), lr=0.1), pskd.batches())
    with pytest.raises(RuntimeError, match=r'no training loss was computed inside tap\(\)'), pskd.tap():
        pass
