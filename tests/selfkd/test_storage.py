"""How a bank keeps its rows: what comes back, on average too, and what the rounding depends on."""

import pytest
import torch

from selfkd.bank import PredictionBank
from selfkd.past import BankPast, TokenBankPast
from selfkd.storage import KINDS, Storage
from selfkd.topk import TopK, draw_top_k

ROWS = 4000


def predictions(classes, sharpness=3.0):
    return torch.randn(1, classes, generator=torch.Generator().manual_seed(classes)).mul(sharpness).softmax(1)


def many(storage, probs, step=0):
    """The rows that come back where one prediction is kept in many."""
    wide = TopK(*(part.expand(ROWS, -1) for part in probs)) if isinstance(probs, TopK) else probs.expand(ROWS, -1)
    rows = storage.decode(storage.encode(wide, torch.arange(ROWS), step))
    return rows if isinstance(rows, torch.Tensor) else rows.dense(storage.num_classes)


@pytest.mark.parametrize(
    'probs',
    [
        predictions(10),
        predictions(1000),
        predictions(1000, sharpness=0.1),  # nothing stands out: no row may end with less than nothing for the largest
        predictions(1000, sharpness=30.0),
        torch.full((1, 3000), 1 / 3000),
        torch.tensor([[1.0, 0.0, 0.0]]),
        torch.tensor([[0.5, 0.5 - 2e-6, 1e-6, 1e-6]]),
        torch.tensor([[0.45, 0.05, 0.45, 0.05]]),
    ],
)
def test_bytes_are_right_on_average_and_rows_sum_to_one(probs):
    rows, expected = many(Storage(probs.shape[1], dtype='log8'), probs), probs[0]
    torch.testing.assert_close(rows.sum(1), torch.ones(ROWS), atol=1e-4, rtol=0)
    others = expected < expected.max()
    assert ((rows - expected).abs()[:, others] <= 0.045 * expected[others] + 2e-5).all()  # a step is 4.4 %
    # Six deviations of a mean over so many rows; a value between two levels is off by half a step at most, on average.
    deviation = (0.022 * expected + (expected * 2e-5).sqrt()) / ROWS**0.5
    deviation[expected.argmax()] = rows[:, expected.argmax()].std() / ROWS**0.5
    assert ((rows.mean(0) - expected).abs() <= 6 * deviation + 5e-6).all()


@pytest.mark.parametrize('k', [1, 4, 30])
def test_bytes_of_a_few_classes_are_right_on_average_too(k):
    probs, storage = predictions(30), Storage(30, top_k=k, dtype='log8')
    whole = Storage(30, top_k=k)
    expected = whole.decode(whole.encode(probs, torch.arange(1))).dense(30)[0]
    rows = many(storage, probs)
    torch.testing.assert_close(rows.sum(1), torch.ones(ROWS), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.mean(0), expected, atol=1e-3, rtol=1e-2)
    drawn = draw_top_k(probs.log(), k, torch.tensor([0.3]))  # these leave no mass to the other classes
    torch.testing.assert_close(many(storage, drawn).mean(0), drawn.dense(30)[0], atol=1e-3, rtol=1e-2)


def test_rounding_follows_from_row_and_step_alone():
    probs = predictions(50).expand(8, -1)
    storage, rows = Storage(50, dtype='log8'), torch.arange(8)
    before = torch.random.get_rng_state()
    (codes,) = storage.encode(probs, rows, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(storage.encode(probs[:3], rows[[5, 0, 2]], 3)[0], codes[[5, 0, 2]])  # whatever the batch
    assert (storage.encode(probs, rows, 4)[0] != codes).any()
    assert (codes[1:] != codes[0]).any()


@pytest.mark.parametrize('dtype', KINDS)
def test_a_resumed_bank_goes_on_as_one_that_was_not_interrupted(dtype):
    def past(momentum=0.5):
        return BankPast(PredictionBank(6, 5, dtype=dtype), momentum=momentum, way_out='')

    def train(bank, steps):
        for step in steps:
            rows = torch.tensor([step % 6, (step + 3) % 6])
            bank.begin_step(step, rows)
            bank.predict(rows)
            bank.observe(torch.randn(2, 5, generator=torch.Generator().manual_seed(step)))

    whole, first, second = past(), past(), past()
    train(whole, range(20))
    train(first, range(9))
    second.load_state_dict(first.state_dict())
    train(second, range(9, 20))
    assert torch.equal(second.bank.state_dict()['values'], whole.bank.state_dict()['values'])


def test_tokens_are_drawn_and_rounded_by_different_numbers():
    past = TokenBankPast([1] * ROWS, 40, top_k=4, dtype='log8', way_out='')
    logits, labels = predictions(40, sharpness=1.0).log().expand(ROWS, -1), torch.zeros(ROWS, 1)
    for step in range(2):
        past.begin_step(step, torch.arange(ROWS))
        past.predict(labels)
        past.observe(logits)
    rows = past.bank.read(torch.arange(ROWS))
    torch.testing.assert_close(rows.mean(0), logits[0].exp(), atol=0.01, rtol=0)
    torch.testing.assert_close(rows.sum(1), torch.ones(ROWS))


def test_class_ids_of_16_bits():
    classes = torch.tensor([[0, 2**15 - 1, 2**15, 2**16 - 1]])
    for num_classes, dtype in ((2**16, torch.int16), (2**16 + 1, torch.int32)):
        storage = Storage(num_classes, top_k=4)
        stored = storage.encode(TopK(torch.full((1, 4), 0.25), classes), torch.arange(1))
        assert stored[1].dtype == dtype
        assert torch.equal(storage.decode(stored).classes, classes)


def test_a_bank_that_was_saved_with_ids_of_32_bits_is_loaded():
    bank = PredictionBank(2, 40000, top_k=2)
    bank.write(torch.arange(2), TopK(torch.full((2, 2), 0.5), torch.tensor([[1, 39999], [35000, 2]])))
    state = bank.state_dict()
    old = {**state, 'classes': state['classes'].int() & 0xFFFF}
    again = PredictionBank(2, 40000, top_k=2)
    again.load_state_dict(old)
    assert torch.equal(again.read(torch.arange(2)), bank.read(torch.arange(2)))
