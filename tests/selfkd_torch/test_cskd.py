"""CS-KD in a loop of one's own."""

import pytest
import torch
import torch.nn.functional as F
from helpers.loops import loader_of, network, train
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from selfkd.losses import distillation_kl
from selfkd_torch import CSKD, PSKD


def test_cskd_is_the_papers_loss(digits):
    model = network()
    labels = digits.tensors[1]
    cskd = CSKD(loader_of(digits, num_workers=1), model, weight=2.0, temperature=3.0, labels=labels)
    pskd = PSKD(cskd.batches(), num_classes=10, max_epochs=2)  # both over one loader
    partners = []
    for _ in range(2):
        for x, y in pskd.batches():
            rows, (other, other_y) = pskd._rows, cskd._partners
            assert torch.equal(digits.tensors[0][rows], x)
            assert torch.equal(other_y, y)
            logits = model(x)
            torch.manual_seed(2)
            term = cskd.term(logits)
            torch.manual_seed(2)
            with torch.no_grad():
                expected = 2 * distillation_kl(logits, model(other), 3.0)
            torch.testing.assert_close(term, expected)
            torch.testing.assert_close(cskd.logs, {'loss_cskd': expected.detach()})
            assert pskd.loss(logits, y).requires_grad
            partners.append(other)
    assert not torch.equal(torch.cat(partners[:3]), torch.cat(partners[3:]))
    assert pskd.batches() is cskd.batches()


def test_a_data_set_without_labels_is_refused(digits):
    with pytest.raises(ValueError, match='TensorDataset has no attribute targets'):
        CSKD(loader_of(digits), network())


def test_a_tap_adds_the_term_beside_that_of_pskd(digits):
    def losses(tapped):
        model = network()
        cskd = CSKD(loader_of(digits), model, labels=digits.tensors[1])
        pskd = PSKD(cskd.batches(), max_epochs=3)
        if not tapped:
            return train(model, pskd.batches(), lambda x, y: pskd.loss(x, y) + cskd.term(x, y))
        with pskd.tap(), cskd.tap():
            return train(model, pskd.batches(), F.cross_entropy)

    assert losses(True) == losses(False)


def test_in_a_tap_a_sum_over_the_samples_has_a_sum_of_the_term(digits):
    def losses(reduction):
        model = network()
        cskd = CSKD(loader_of(digits), model, labels=digits.tensors[1])
        with cskd.tap():
            share = 1 if reduction == 'mean' else cskd.batches().batch_size
            return train(model, cskd.batches(), lambda x, y: F.cross_entropy(x, y, reduction=reduction) / share)

    assert losses('sum') == pytest.approx(losses('mean'), rel=1e-4)


def test_inputs_by_name_may_be_given_by_place(digits):
    model = network()
    cskd = CSKD(loader_of(digits), model, labels=digits.tensors[1], inputs=lambda batch: dict(input=batch[0]))
    assert len(train(model, cskd.batches(), cskd.loss)) > 1


def test_two_losses_in_a_tap_are_refused(digits):
    model = network()
    cskd = CSKD(loader_of(digits), model, labels=digits.tensors[1])
    with pytest.raises(RuntimeError, match='CSKD: a second cross-entropy in one batch'), cskd.tap():
        train(model, cskd.batches(), lambda x, y: F.cross_entropy(x, y) + F.cross_entropy(-x, y))


@pytest.mark.parametrize('first', ['pskd', 'cskd'])
@pytest.mark.parametrize('named', [False, True])
def test_taps_may_be_opened_in_any_order(digits, first, named):
    model, criterion = network(), nn.CrossEntropyLoss()
    cskd = CSKD(loader_of(digits), model, labels=digits.tensors[1])
    pskd = PSKD(cskd.batches(), num_classes=10, max_epochs=2)  # both over one loader
    loss_of = [criterion] if named else []
    taps = {'pskd': lambda: pskd.tap(*loss_of), 'cskd': lambda: cskd.tap(*loss_of)}
    second = 'cskd' if first == 'pskd' else 'pskd'
    for _ in range(2):
        for x, y in pskd.batches():
            with taps[first](), taps[second]():
                loss = criterion(model(x), y)
            parts = pskd.logs['pskd_hard'] + pskd.logs['pskd_soft'] + cskd.logs['loss_cskd']
            assert loss.item() == pytest.approx(float(parts), rel=1e-5)
    assert pskd.logs['pskd_soft'] > 0
    assert cskd.logs['loss_cskd'] > 0


@pytest.mark.parametrize('mixing', [False, True])
def test_of_two_classes_smoothing_is_told_from_mixing(digits, mixing):
    def collate(samples):
        x, y = default_collate(samples)
        q = F.one_hot(y, 2) * 0.9 + 0.05
        return (x, 0.7 * q + 0.3 * q.flip(0)) if mixing else (x, q)

    labels = digits.tensors[1] % 2
    data = TensorDataset(digits.tensors[0], labels)
    model = nn.Sequential(network(), nn.Linear(10, 2))
    cskd = CSKD(loader_of(data, collate_fn=collate), model, labels=labels)
    if mixing:
        with pytest.raises(ValueError, match='leave out Mixup and CutMix'):
            train(model, cskd.batches(), cskd.loss, epochs=1)
    else:
        train(model, cskd.batches(), cskd.loss, epochs=1)


def test_mixed_labels_are_refused_and_smoothed_ones_are_not(digits):
    """A collate function that mixes mixes the partners with others: theirs would be another class."""

    def collate(mixing):
        def collated(samples):
            x, y = default_collate(samples)
            q = F.one_hot(y, 10) * 0.9 + 0.01
            return (0.7 * x + 0.3 * x.flip(0), 0.7 * q + 0.3 * q.flip(0)) if mixing else (x, q)

        return collated

    for mixing in (False, True):
        model = network()
        loader = loader_of(digits, collate_fn=collate(mixing))
        cskd = CSKD(loader, model, labels=digits.tensors[1])
        if mixing:
            with pytest.raises(ValueError, match='leave out Mixup and CutMix'):
                train(model, cskd.batches(), cskd.loss, epochs=1)
        else:
            train(model, cskd.batches(), cskd.loss, epochs=1)
