"""PredictionBank: round trips, error bounds, what it refuses, what it saves."""

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import selfkd.bank
from selfkd.bank import PredictionBank, draw_top_k
from selfkd.losses import TopK
from selfkd.storage import KINDS


def probs(rows, classes, seed=0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(1)


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float32, 0.0), (torch.float16, 2**-11)])
def test_round_trip_is_exact_in_float32_and_rounded_in_float16(dtype, bound):
    bank = PredictionBank(10, 7, dtype=dtype)
    written, indices = probs(4, 7), torch.tensor([9, 0, 3, 5])
    bank.write(indices, written)
    read = bank.read(indices.flip(0)).flip(0)
    assert read.dtype == torch.float32
    assert (read - written).abs().max() <= bound * written.max()


@settings(deadline=None, max_examples=40)
@given(classes=st.integers(2, 30), data=st.data(), seed=st.integers(0, 10**6))
def test_top_k_keeps_the_largest_and_spreads_the_rest(classes, data, seed):
    k = data.draw(st.integers(1, classes))
    bank, written = PredictionBank(3, classes, top_k=k), probs(3, classes, seed)
    bank.write(torch.arange(3), written)
    read = bank.read(torch.arange(3))
    torch.testing.assert_close(read.sum(1), torch.ones(3))
    top = written.topk(k, 1)
    torch.testing.assert_close(read.gather(1, top.indices), top.values)
    # A class that was not kept is at most the k-th largest, and so is the even share: their distance too.
    assert (read - written).abs().max() <= top.values[:, -1].max() + 1e-6
    rows = bank.read_top_k(torch.arange(3))
    assert isinstance(rows, TopK)
    torch.testing.assert_close(rows.dense(classes), read)


def test_a_row_never_written_is_an_error_unless_asked_for():
    bank = PredictionBank(5, 3)
    bank.write(torch.tensor([1]), probs(1, 3))
    with pytest.raises(KeyError, match=r'rows \[4\] were never written'):
        bank.read(torch.tensor([1, 4]))
    read, seen = bank.read(torch.tensor([1, 4]), return_seen=True)
    assert seen.tolist() == [True, False]
    torch.testing.assert_close(read[1], torch.full((3,), 1 / 3))
    for top_k in (2, 3):
        bank = PredictionBank(5, 3, top_k=top_k)
        torch.testing.assert_close(bank.read(torch.tensor([0]), return_seen=True)[0], torch.full((1, 3), 1 / 3))


def test_the_last_of_repeated_indices_stays():
    bank, rows = PredictionBank(4, 3), probs(5, 3)
    bank.write(torch.tensor([2, 1, 2, 3, 2]), rows)
    torch.testing.assert_close(bank.read(torch.tensor([1, 2, 3])), rows[[1, 4, 3]], rtol=0, atol=0)


def test_what_is_read_is_a_copy():
    bank = PredictionBank(2, 3)
    bank.write(torch.tensor([0]), probs(1, 3))
    before = bank.read(torch.tensor([0])).clone()
    bank.read(torch.tensor([0])).zero_()
    torch.testing.assert_close(bank.read(torch.tensor([0])), before)


@pytest.mark.parametrize('settings_', [dict(dtype=dtype, top_k=top_k) for dtype in KINDS for top_k in (None, 2)])
def test_state_is_plain_and_restores_everything(settings_):
    bank = PredictionBank(6, 4, **settings_)
    bank.write(torch.tensor([0, 5]), probs(2, 4))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    restored = PredictionBank(6, 4, **settings_)
    restored.load_state_dict(torch.load(file, weights_only=True))
    everything = torch.arange(6)
    torch.testing.assert_close(
        restored.read(everything, return_seen=True), bank.read(everything, return_seen=True), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        (dict(num_samples=7, num_classes=4), 'num_samples=6, this one num_samples=7'),
        (dict(num_samples=6, num_classes=5), 'num_classes=4, this one num_classes=5'),
        (dict(num_samples=6, num_classes=4, top_k=2), 'top_k=None, this one top_k=2'),
        (dict(num_samples=6, num_classes=4, dtype='log8'), 'dtype=float32, this one dtype=log8'),
    ],
)
def test_a_state_of_another_bank_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        PredictionBank(**other).load_state_dict(PredictionBank(6, 4).state_dict())


def test_states_without_the_name_of_their_storage_load():
    """Of versions that did not write it."""
    for dtype in KINDS:
        bank = PredictionBank(3, 4, dtype=dtype)
        bank.write(torch.tensor([1]), probs(1, 4))
        state = bank.state_dict()
        assert state.pop('dtype') == dtype
        again = PredictionBank(3, 4, dtype=dtype)
        again.load_state_dict(state)
        assert torch.equal(again.read(torch.tensor([1])), bank.read(torch.tensor([1])))


def test_the_name_tells_storages_of_the_same_type_apart():
    state = dict(PredictionBank(3, 4, dtype='log8').state_dict(), dtype='bytes')
    with pytest.raises(ValueError, match='has dtype=bytes, this one dtype=log8'):
        PredictionBank(3, 4, dtype='log8').load_state_dict(state)


def test_encoded_rows_travel_between_banks():
    for settings_ in (dict(dtype=dtype, top_k=top_k) for dtype in KINDS for top_k in (None, 3)):
        a, b = PredictionBank(6, 8, **settings_), PredictionBank(6, 8, **settings_)
        indices = torch.tensor([4, 1])
        a.write(indices, probs(2, 8))
        b.write_encoded(indices, a.read_encoded(indices))
        torch.testing.assert_close(b.read(indices), a.read(indices), rtol=0, atol=0)


def test_nbytes_counts_every_tensor():
    assert PredictionBank(10, 7).nbytes == 10 * (7 * 4 + 1)
    assert PredictionBank(10, 7, dtype=torch.float16).nbytes == 10 * (7 * 2 + 1)
    assert PredictionBank(10, 1000, top_k=16).nbytes == 10 * (16 * (4 + 2) + 1)  # class ids fit in 16 bits
    assert PredictionBank(10, 2**16, top_k=16).nbytes == 10 * (16 * (4 + 2) + 1)
    assert PredictionBank(10, 2**16 + 1, top_k=16).nbytes == 10 * (16 * (4 + 4) + 1)
    assert PredictionBank(10, 1000, dtype='log8').nbytes == 10 * (1000 + 1)
    assert PredictionBank(10, 1000, top_k=16, dtype='log8').nbytes == 10 * (17 + 16 * 2 + 1)


def test_a_table_beyond_half_of_the_free_memory_is_refused_with_the_way_out(monkeypatch):
    # The real limit would need a real allocation of half the machine: the free memory is made small instead.
    monkeypatch.setattr(selfkd.bank, 'free_memory', lambda device: 10**6)
    with pytest.raises(
        MemoryError,
        match=r"1000 x 1000 probabilities .* set top_k \(16 is plenty\) or set dtype='float16' or set dtype='log8'",
    ):
        PredictionBank(1000, 1000)
    PredictionBank(1000, 1000, top_k=16)
    monkeypatch.setattr(selfkd.bank, 'processes_sharing', lambda device: 8)
    with pytest.raises(MemoryError, match='take 0.0 GiB in each of 8 processes, more than half'):
        PredictionBank(1000, 1000, top_k=16)


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (lambda b: b.write(torch.tensor([0]), torch.ones(1, 3)), ValueError, r'probs: each distribution must'),
        (
            lambda b: b.write(torch.tensor([0]), torch.full((1, 3), float('nan'))),
            ValueError,
            r'probs: holds values that are not finite: training has diverged',
        ),
        (
            lambda b: PredictionBank(5, 3, top_k=1).write(
                torch.tensor([0]), TopK(torch.tensor([[float('nan')]]), torch.tensor([[1]]))
            ),
            ValueError,
            r'probs: holds values that are not finite: training has diverged',
        ),
        (lambda b: b.write(torch.tensor([0]), probs(1, 4)), ValueError, r'probs: must be floating, \[B, 3\]'),
        (lambda b: b.write(torch.tensor([0, 1]), probs(1, 3)), ValueError, r'a row for each of 2 indices, got 1'),
        (lambda b: b.write(torch.tensor([5]), probs(1, 3)), IndexError, r'\[0, num_samples=5\), got values from 5'),
        (lambda b: b.read(torch.tensor([-1])), IndexError, r'got values from -1'),
        (lambda b: b.read(torch.tensor([0.0])), ValueError, r'indices: must be integers'),
        (lambda b: b.read_top_k(torch.tensor([0])), ValueError, r'top_k: this bank keeps whole rows'),
        (lambda b: PredictionBank(0, 3), ValueError, r'num_samples: must be at least 1, got 0'),
        (lambda b: PredictionBank(3, 1), ValueError, r'num_classes: must be at least 2, got 1'),
        (lambda b: PredictionBank(3, 3, top_k=4), ValueError, r'top_k: must lie in \[1, num_classes=3\]'),
        (
            lambda b: PredictionBank(3, 3, dtype=torch.int8),
            ValueError,
            r"dtype: must be one of \['float32', 'float16', 'log8'\], got torch.int8",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(PredictionBank(5, 3))


@pytest.mark.parametrize('settings_', [dict(dtype=dtype, top_k=top_k) for dtype in KINDS for top_k in (None, 2)])
def test_rows_of_an_accelerator_that_are_not_finite_are_left_out_and_counted(settings_):
    """The part of write() that an accelerator's rows take; here they are the CPU's, and arrive at once."""
    bank, old, new = PredictionBank(6, 4, **settings_), probs(2, 4), probs(4, 4, seed=1)
    bank.write(torch.tensor([0, 1]), old)
    before = bank.read(torch.tensor([0, 1]))
    new[[0, 2]] = float('nan')
    rows = PredictionBank(6, 4, **settings_)
    rows.write(torch.tensor([1, 3]), new[[1, 3]])
    finite = new.isfinite().all(1)
    encoded = bank.storage.encode(new, torch.arange(4))
    bank._write_later(torch.tensor([0, 1, 2, 3]), encoded, finite)
    assert bank.skipped == 2
    read, seen = bank.read(torch.arange(6), return_seen=True)
    assert seen.tolist() == [True, True, False, True, False, False]
    torch.testing.assert_close(read[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(read[[1, 3]], rows.read(torch.tensor([1, 3])), rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('top_k', [None, 2])
def test_a_step_that_overflowed_on_an_accelerator(device, top_k):
    bank, rows = PredictionBank(8, 5, device=device, top_k=top_k), probs(4, 5).cuda()
    bank.write(torch.tensor([1, 2]), rows[:2])
    before = bank.read(torch.tensor([1, 2]))
    rows[2] = float('nan')
    bank.write(torch.tensor([3, 1, 2]), rows[[2, 2, 3]])
    read, seen = bank.read(torch.tensor([1, 2, 3]), return_seen=True)
    assert seen.tolist() == [True, True, False]
    torch.testing.assert_close(read[0], before[0])
    assert (read[1] != before[1]).any()
    assert bank.skipped == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device: rows on their way from GPU to CPU')
@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_writes_from_an_accelerator(device):
    bank, rows = PredictionBank(8, 5, device=device), probs(6, 5).cuda()
    bank.write(torch.tensor([1, 2, 3]), rows[:3])
    bank.write(torch.tensor([3, 4, 5]), rows[3:])
    torch.testing.assert_close(bank.read(torch.tensor([1, 2, 3, 4, 5])).cpu(), rows[[0, 1, 3, 4, 5]].cpu())


@settings(deadline=None, max_examples=40)
@given(classes=st.integers(2, 60), sharpness=st.floats(0, 20), data=st.data(), seed=st.integers(0, 10**6))
def test_drawn_classes_are_the_prediction_on_average(classes, sharpness, data, seed):
    k, times = data.draw(st.integers(1, classes)), 2000
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, classes, generator=generator) * sharpness
    drawn = draw_top_k(logits.expand(times, -1), k, torch.rand(times, generator=generator))
    rows, expected = drawn.dense(classes), logits.softmax(1)[0]
    assert all(len(row.unique()) == k for row in drawn.classes[:50])
    torch.testing.assert_close(drawn.values.sum(1), torch.ones(times), atol=1e-4, rtol=0)
    share = drawn.values.min()
    torch.testing.assert_close(rows[:, expected > 1.01 * share], expected[expected > 1.01 * share].expand(times, -1))
    assert (rows <= torch.maximum(expected, share) * 1.01 + 1e-6).all()
    # A class is there with probability p / share, so the mean over the draws has this standard deviation.
    deviation = (expected * (share - expected).clamp(min=0) / times).sqrt()
    assert ((rows.mean(0) - expected).abs() <= 6 * deviation + 1e-3 * share + 1e-6).all()


def test_drawing_where_there_is_nothing_to_draw():
    half = torch.tensor([0.5])
    certain = torch.full((1, 9), -torch.inf)  # masked classes, one that is sure
    certain[0, 8] = 0
    assert torch.equal(draw_top_k(certain, 3, half).dense(9), certain.exp())
    logits = probs(1, 9).log()
    torch.testing.assert_close(draw_top_k(logits, 9, half).dense(9), logits.exp())
    assert draw_top_k(logits.fill_(torch.nan), 3, half).values.isnan().all()  # which the bank will not keep
    overflowed = draw_top_k(torch.tensor([[torch.inf, 0.0, 1.0]]), 2, half)
    assert not overflowed.values.isfinite().any()


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_indices_of_any_integer_type_name_rows(dtype):
    bank, rows = PredictionBank(4, 3), probs(2, 3)
    bank.write(torch.tensor([1, 3], dtype=dtype), rows)
    read, seen = bank.read(torch.tensor([3, 1, 0], dtype=dtype), return_seen=True)
    assert torch.equal(read[:2], rows.flip(0))
    assert seen.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ('name', 'damage'),
    [
        ('values', lambda values: values[:, :1]),
        ('values', lambda values: values * math.nan),
        ('values', lambda values: values.half()),
        ('classes', lambda classes: classes + 4),
        ('seen', lambda seen: seen[:1]),
    ],
)
def test_a_damaged_state_is_refused(name, damage):
    bank = PredictionBank(3, 4, top_k=2)
    state = bank.state_dict()
    with pytest.raises(ValueError, match='the saved bank is damaged'):
        bank.load_state_dict({**state, name: damage(state[name])})
