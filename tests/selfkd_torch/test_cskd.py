"""CS-KD in a loop of one's own."""

import pytest
import torch
import torch.nn.functional as F
from helpers.loops import loader_of, network, train
from torch.utils.data import default_collate

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
