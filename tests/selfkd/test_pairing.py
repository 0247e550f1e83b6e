"""Same-class partners: right class, uniform over the class, and from the generator alone."""

import pytest
import torch

from selfkd.pairing import SameClassPairing, same_class_partners
from selfkd.seeds import step_generator


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


def drawn_from(labels, objects=None, images=None, ignore=None, draws=4000):
    """How often each sample [N, N] was drawn as each one's partner, as a share of the draws."""
    columns = [None if column is None else torch.tensor(column) for column in (labels, objects, images)]
    generator, n = torch.Generator().manual_seed(0), len(labels)
    shares = torch.zeros(n, n)
    for _ in range(draws):
        partners = same_class_partners(*columns, ignore=ignore, generator=generator)
        shares[torch.arange(n), partners] += 1 / draws
    return shares


def test_partners_in_a_batch_are_of_another_image_then_of_another_object_then_another_region():
    """Shares of 4000 draws, to 4 standard errors: objects alike, whatever the number of their regions."""
    #  sample  0  1  2  3  4  5  6  7  8  9 10 11 12 13
    labels = [2, 2, 2, 2, 2, 2, 7, 7, 7, 4, 4, 4, 5, 1]
    images = [0, 0, 0, 1, 1, 2, 0, 0, 0, 1, 1, 1, 2, 2]
    objects = [0, 0, 1, 0, 1, 0, 2, 2, 3, 4, 4, 4, 0, 5]  # 0 in image 0 and 0 in image 1 are two objects
    half, third = 1 / 2, 1 / 3
    expected = torch.zeros(14, 14)
    expected[0:3, 3:6] = third  # two objects in image 1, one in image 2
    expected[3:5, 0:2], expected[3:5, 2], expected[3:5, 5] = third / 2, third, third
    expected[5, 0:2], expected[5, 2:5] = 1 / 8, 1 / 4  # four objects, the first with two regions
    expected[6:8, 8], expected[8, 6:8] = 1, half  # one image: the other object
    expected[9:12, 9:12] = half * (1 - torch.eye(3))  # one object: its other regions
    expected[12, 12] = expected[13, 13] = 1  # nothing else
    assert torch.all((drawn_from(labels, objects, images) - expected).abs() < 4 * 0.5 / 4000**0.5)
    expected[0:6] = torch.eye(14)[0:6]
    assert torch.all((drawn_from(labels, objects, images, ignore=2) - expected).abs() < 4 * 0.5 / 4000**0.5)


def test_tokens_are_objects_of_their_own():
    """By default: any other sample of the class; with sentences: of the other sentences."""
    expected = torch.tensor([[0.0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 2]]) / 2
    assert torch.all((drawn_from([3, 3, 3, 4]) - expected).abs() < 0.032)
    assert torch.allclose(drawn_from([3, 3, 3], images=[0, 0, 1], draws=100)[:2, 2], torch.ones(2))


@pytest.mark.parametrize('labels', [[], [1, 2, 3], [0, 0, 0]])
def test_batches_without_pairs(labels):
    partners = same_class_partners(torch.tensor(labels, dtype=torch.long), ignore=0)
    assert torch.equal(partners, torch.arange(len(labels)))  # each is its own


def test_pairs_follow_from_the_step_and_leave_torchs_random_state_alone():
    labels, state = torch.arange(200) % 4, torch.random.get_rng_state()
    first, again, next_step = (same_class_partners(labels, generator=step_generator(step)) for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_ids_of_ten_digits_take_no_memory_and_indices_are_checked():
    pairing = SameClassPairing([5_000_000_000, 7, 5_000_000_000])
    assert set(pairing.draw([0] * 20).tolist()) <= {0, 2}
    for wrong in ([-1], [3]):
        with pytest.raises(IndexError, match=r'must lie in \[0, 3\)'):
            pairing.draw(wrong)
