"""Same-class partners: right class, uniform over the class, and from the generator alone."""

import pytest
import torch

from selfkd.pairing import SameClassPairing, same_class_partners


def test_partners_have_the_anchors_class():
    labels = torch.tensor([3, 0, 3, 0, 1, 3, 7])
    indices = torch.randint(0, 7, (500,))
    assert torch.equal(labels[SameClassPairing(labels).draw(indices)], labels[indices])


def test_partners_are_uniform_over_the_class_and_may_be_the_anchor():
    """5 samples of class 0: 20,000 draws for anchor 2 hit each with a share of 0.2 +- 0.012 (4 standard errors)."""
    pairing = SameClassPairing([0, 1, 0, 0, 1, 0, 0])
    drawn = pairing.draw([2] * 20000, torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=7) / 20000
    assert share[[1, 4]].sum() == 0
    assert torch.all((share[[0, 2, 3, 5, 6]] - 0.2).abs() < 0.012)


def test_a_class_with_a_single_sample_is_its_own_partner():
    assert SameClassPairing([5, 2, 5]).draw([1, 1]).tolist() == [1, 1]


def test_draws_follow_from_the_generator():
    pairing = SameClassPairing([0] * 1000)
    first, again = (pairing.draw(range(50), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, pairing.draw(range(50), torch.Generator().manual_seed(4)))


@pytest.mark.parametrize('labels', [[], [[0, 1]], [0.5], [-1, 0]])
def test_labels_that_are_not_one_class_per_sample_are_refused(labels):
    with pytest.raises(ValueError, match='labels: must be one class id'):
        SameClassPairing(labels)


def test_partners_within_a_batch_have_the_same_class():
    labels = torch.randint(0, 8, (40,), generator=torch.Generator().manual_seed(0))
    anchors, partners = same_class_partners(labels, ignore=1)
    assert torch.equal(labels[anchors], labels[partners])
    assert (anchors != partners).all()
    assert 1 not in labels[anchors]
    counts = labels.bincount()
    assert len(anchors) == sum(n for label, n in enumerate(counts.tolist()) if n > 1 and label != 1)
    assert anchors.unique().numel() == partners.unique().numel() == len(anchors)  # everyone teaches one
    assert len(same_class_partners(torch.tensor([1, 2, 3]))[0]) == 0
