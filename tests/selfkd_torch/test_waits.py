"""A training step never waits for a GPU, counted on a simulated one (tools/simulated_gpu.py)."""

from contextlib import nullcontext

import pytest
import torch
from simulated_gpu import SimulatedGPU
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from selfkd.bank import PredictionBank
from selfkd.losses import (
    TopK,
    attention_transfer,
    overhaul_loss,
    pskd_cross_entropy,
    pskd_loss,
    quality_focal_loss,
    soft_cross_entropy,
)
from selfkd.pairing import same_class_partners
from selfkd.past import BankPast, TokenBankPast
from selfkd.seeds import step_generator
from selfkd.transfer import to_host
from selfkd_torch import CSKD, FRSKD, PSKD, TokenPSKD

NUMBERS = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(12, 3, 8, 8, generator=NUMBERS), torch.arange(12) % 3
LINES = torch.randint(7, (12, 5), generator=NUMBERS)
LINES[:, 4] = -100


def network():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(32, 3))


class Words(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(7, 4), nn.Linear(4, 7))

    def forward(self, x):
        return super().forward(x.clamp(min=0)).flatten(0, 1)


def loader(inputs=IMAGES, labels=LABELS):
    return DataLoader(TensorDataset(inputs, labels), batch_size=4)


def frskd(model):
    return FRSKD(model, ['2', '4'], 3, example=torch.zeros(1, 3, 8, 8))


METHODS = {
    'bank': lambda model: PSKD(loader(), max_epochs=3),
    'bank, top-2': lambda model: PSKD(loader(), max_epochs=3, top_k=2),
    'bank on the CPU': lambda model: PSKD(loader(), max_epochs=3, bank_device='cpu', bank_dtype='float16'),
    'bank of bytes': lambda model: PSKD(loader(), max_epochs=3, bank_dtype='log8'),
    'momentum': lambda model: PSKD(loader(), max_epochs=3, bank_momentum=0.5),
    'snapshot': lambda model: PSKD(loader(), max_epochs=3, teacher='snapshot', model=model),
    'ema': lambda model: PSKD(loader(), max_epochs=3, teacher='ema', model=model),
    'cskd': lambda model: CSKD(loader(), model, labels=LABELS),
    'frskd': frskd,
    'tokens': lambda model: TokenPSKD(loader(LINES, LINES), max_epochs=3, top_k=3),
}


def train(name, put, look=lambda epoch, first=False: None, default=None):
    """The losses of three epochs. ``put`` takes modules and tensors to where they are trained."""
    torch.manual_seed(0)
    model = Words() if name == 'tokens' else network()
    if default:
        put(model)
    with default or nullcontext():
        method = METHODS[name](model)
        parts = model, getattr(method, 'self_teacher', None), getattr(getattr(method, 'past', None), 'model', None)
        for module in () if default else filter(None, parts):
            put(module)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, foreach=False)
        losses = []
        for epoch in range(3):
            for batch, (inputs, labels) in enumerate(loader() if name == 'frskd' else method.batches()):
                inputs, labels = put(inputs), put(labels.flatten())
                look(-1)
                loss = method.loss(model(inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                look(epoch, first=batch == 0)
                losses.append(loss.detach())
    return losses


def waits(gpu, first):
    """But those of the looks at an epoch's first batch: at CS-KD's inputs, and at the order of a call's samples."""
    looks = ('selfkd_torch/calls.py', 'selfkd_torch/cskd.py')
    return [wait for wait in gpu.waits if not (first and any(file in wait for file in looks))]


@pytest.mark.parametrize('name', METHODS)
def test_a_step_does_not_wait(name):
    """From the second epoch on, where there is a past; and it computes what it computes on the CPU."""
    with SimulatedGPU() as gpu:

        def look(epoch, first=False):
            assert epoch < 1 or not waits(gpu, first)
            assert not gpu.nondeterministic
            gpu.waits.clear()

        losses = train(name, gpu.put, look)
    expected = train(name, lambda value: value)
    torch.testing.assert_close([loss.values for loss in losses], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('name', ['bank', 'bank, top-2', 'bank on the CPU', 'bank of bytes', 'cskd', 'tokens'])
def test_the_default_device_does_not_move_what_is_kept_on_the_host(name):
    """With ``torch.set_default_device('cuda')`` the losses are the same, and a step does not wait either."""
    expected = train(name, lambda value: value)
    with SimulatedGPU() as gpu:

        def look(epoch, first=False):
            assert epoch < 1 or not waits(gpu, first)
            gpu.waits.clear()

        losses = train(name, gpu.put, look, default=torch.device('cuda'))
    torch.testing.assert_close([loss.values for loss in losses], expected, rtol=1e-3, atol=1e-6)


def test_samples_that_are_new_are_not_waited_for():
    past = BankPast(PredictionBank(3, 3), way_out='')
    with SimulatedGPU() as gpu:
        for step, rows in enumerate([[0, 1], [1, 2]]):
            past.begin_step(step, torch.tensor(rows))
            labels = gpu.put(torch.tensor(rows))
            prediction = past.predict(labels)
            past.observe(gpu.put(torch.randn(2, 3)))
        prediction = prediction.to(labels.device)
        pskd_loss(gpu.put(torch.randn(2, 3)), labels, prediction.probs, prediction.alpha(0.5))
        prediction.entropy(3)
        assert not gpu.waits


def test_tokens_that_are_not_those_of_their_rows_are_noticed_on_a_gpu():
    past = TokenBankPast([3, 2], 5, top_k=2, way_out='go')
    lines = torch.tensor([[1, 2, 3], [4, 1, -100]])
    with SimulatedGPU() as gpu:
        for step, labels in enumerate((lines, lines, lines.clamp(min=1), lines + (lines > 0).int())):
            past.begin_step(step, torch.tensor([0, 1]))
            refusal = {2: 'more labels than when the bank was made', 3: 'had the label 1 before'}.get(step)
            with pytest.raises(ValueError, match=refusal) if refusal else nullcontext():
                past.predict(gpu.put(labels))
            past.observe(gpu.put(torch.randn(6, 5)))


@pytest.mark.parametrize(
    ('last', 'refusal'),
    [([[2, 2, 3], [4, 1, -100]], 'had the label 1 before'), ([[1, 2, 3], [4, 1, 1]], 'more labels than')],
)
def test_the_last_labels_of_a_training_are_looked_at_too(last, refusal, monkeypatch):
    monkeypatch.setattr('simulated_gpu.Event.query', lambda event: False)  # not there yet, whenever somebody looks
    past = TokenBankPast([3, 2], 5, top_k=2, way_out='go')
    with SimulatedGPU() as gpu:
        for step, labels in enumerate(([[1, 2, 3], [4, 1, -100]], last)):
            past.begin_step(step, torch.tensor([0, 1]))
            past.predict(gpu.put(torch.tensor(labels)))
        with pytest.raises(ValueError, match=refusal):
            past.synchronize()


LOSSES = {
    'weights': lambda z, y, p: soft_cross_entropy(z, p, class_weight=[1.0, 2.0, 3.0]),
    'torch, weights': lambda z, y, p: pskd_cross_entropy(
        z, y, p, 0.3, weight=torch.ones_like(p[0]), label_smoothing=0.1
    ),
    'alpha of each': lambda z, y, p: pskd_loss(z, y, p, torch.tensor([0.0, 0.5, 1.0, 0.3]), ignore_index=2),
    'top-2': lambda z, y, p: pskd_loss(z, y, TopK(*p.topk(2)), 0.3, label_smoothing=0.1),
    'margin': lambda z, y, p: overhaul_loss(z, p),
    'attention': lambda z, y, p: attention_transfer(z[:, :, None], p[:, :, None]),
    'quality': lambda z, y, p: quality_focal_loss(z, p),
}


@pytest.mark.parametrize('name', LOSSES)
def test_a_loss_does_not_wait(name):
    logits, labels, past = torch.randn(4, 3).requires_grad_(), torch.tensor([0, 2, 1, 1]), torch.randn(4, 3).softmax(1)
    expected = LOSSES[name](logits, labels, past)
    expected.backward()
    with SimulatedGPU() as gpu:
        there, *constants = map(gpu.put, (logits, labels, past))
        loss = LOSSES[name](there, *constants)
        loss.backward()
    assert not gpu.waits
    assert not gpu.nondeterministic
    torch.testing.assert_close([loss.values, there.grad.values], [expected.detach(), logits.grad])


def test_pairs_are_drawn_without_waiting():
    labels, images = torch.randint(5, (60,)), torch.arange(60) // 20
    drawn = [same_class_partners(labels, images=images, ignore=0, generator=step_generator(1))]
    with SimulatedGPU() as gpu:
        drawn.append(same_class_partners(gpu.put(labels), None, gpu.put(images), ignore=0, generator=step_generator(1)))
    assert not gpu.waits
    assert torch.equal(drawn[0], drawn[1].values)


def test_the_simulated_gpu_notices_waiting():
    x = torch.arange(3.0)
    with SimulatedGPU() as gpu:
        y = gpu.put(x)
        for wait in (y.sum, y.nonzero, lambda: y[y > 1], lambda: y[torch.tensor([0])], lambda: x.to('cuda:0'), y.cpu):
            gpu.waits.clear()
            result = wait()
            if wait == y.sum:
                assert not gpu.waits
                result.item()
            assert sum(gpu.waits.values()) == 1
        y.cumsum(0)
        assert gpu.nondeterministic == {'cumsum'}
        with pytest.raises(RuntimeError, match='on the GPU and on the CPU'):
            y + x
        (late,), event = to_host(y)
        assert not torch.equal(late, x)  # it is not there yet
        event.synchronize()
        assert torch.equal(late, x)
