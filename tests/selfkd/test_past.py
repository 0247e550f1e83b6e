"""The sources of the past by themselves; what the plugins make of them is in tests/promises and theirs."""

import pytest
import torch
from torch import nn

from selfkd.bank import PredictionBank
from selfkd.options import choose_teacher, refuse_without_past
from selfkd.past import AveragePast, BankPast, Prediction, SnapshotPast, TokenBankPast, copy_past

ROWS = torch.tensor([2, 0])
LABELS = torch.tensor([1, 0])


def bank_past(**options):
    bank = PredictionBank(3, 2, **{name: options.pop(name) for name in ('top_k',) if name in options})
    return BankPast(bank, way_out="set teacher='snapshot'", **options)


def steps(past, *logits, rows=ROWS, labels=LABELS):
    """One step for each of the logits; what was predicted in the last."""
    for step, values in enumerate(logits):
        past.begin_step(step, rows)
        prediction = past.predict(labels)
        past.observe(torch.as_tensor(values))
    return prediction


def test_a_bank_gives_what_was_seen_last():
    first, second = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    past = bank_past()
    assert steps(past, first) is None
    assert not past.ready
    prediction = steps(past, second)
    assert torch.equal(prediction.probs, first.softmax(1))
    assert prediction.known.tolist() == [True, True]
    assert past.ready


def test_samples_without_a_past_have_alpha_zero():
    past = bank_past()
    steps(past, torch.zeros(1, 2), rows=ROWS[:1], labels=LABELS[:1])
    prediction = steps(past, torch.zeros(2, 2))
    assert prediction.alpha(0.8).tolist() == pytest.approx([0.8, 0.0])
    assert Prediction(prediction.probs, True).alpha(0.8) == 0.8


def test_momentum_averages_rows():
    z = [torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[-1.0, 0.0], [2.0, 0.0]]), torch.zeros(2, 2)]
    p = [logits.softmax(1) for logits in z]
    past = bank_past(momentum=0.75)
    kept = steps(past, *z).probs
    assert torch.allclose(kept, 0.75 * p[0] + 0.25 * p[1])  # the first is kept as it is
    assert torch.allclose(past.bank.read(ROWS), 0.75 * kept + 0.25 * p[2])


@pytest.mark.parametrize(
    ('momentum', 'top_k', 'words'), [(1.0, None, r'lie in \[0, 1\)'), (-0.1, None, 'lie'), (0.5, 1, 'top_k=1')]
)
def test_momentum_that_cannot_work_is_refused(momentum, top_k, words):
    with pytest.raises(ValueError, match=f'bank_momentum.*{words}'):
        bank_past(momentum=momentum, top_k=top_k)


def test_another_sample_is_refused_with_the_way_out():
    past = bank_past()
    steps(past, torch.zeros(2, 2))
    past.begin_step(1, ROWS)
    with pytest.raises(ValueError, match="row 2 .*set teacher='snapshot'"):
        past.predict(LABELS.flip(0))


def tokens():
    return TokenBankPast([3, 2], 5, top_k=5, dtype=torch.float32, way_out="set teacher='snapshot'")


def test_padding_on_either_side_changes_no_row():
    labels, past = torch.tensor([[1, 2, 3], [4, 1, -100]]), tokens()
    z = torch.randn(6, 5)
    past.begin_step(0, torch.tensor([0, 1]))
    assert past.predict(labels) is None
    past.observe(z)
    past.begin_step(1, torch.tensor([1, 0]))
    prediction = past.predict(torch.tensor([[-100, -100, 4, 1], [-100, 1, 2, 3]]))  # padded on the left, and shuffled
    assert prediction.known.tolist() == [False, False, True, True, False, True, True, True]
    expected = z.softmax(1)[[3, 4, 0, 1, 2]]
    assert torch.allclose(prediction.probs.dense(5)[prediction.known], expected, atol=1e-6)


def test_a_token_bank_refuses_other_and_more_labels():
    past = tokens()
    steps(past, torch.zeros(6, 5), rows=torch.tensor([0, 1]), labels=torch.tensor([[1, 2, 3], [4, 1, -100]]))
    past.begin_step(1, torch.tensor([1]))
    with pytest.raises(ValueError, match='had the label 1 before, and has the label 3'):
        past.predict(torch.tensor([[4, 3]]))
    past.begin_step(2, torch.tensor([1]))
    with pytest.raises(ValueError, match="more labels than when the bank was made.*set teacher='snapshot'"):
        past.predict(torch.tensor([[4, 1, 2]]))


def test_a_sample_without_any_label_touches_no_row():
    past = TokenBankPast([2, 0], 5, top_k=2, way_out='')
    steps(past, torch.zeros(2, 5), rows=torch.tensor([1]), labels=torch.tensor([[-100, -100]]))
    assert not past.bank.seen(torch.arange(2)).any()


def network(value):
    return nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)).requires_grad_(True).apply(lambda m: _fill(m, value))


def _fill(module, value):
    for parameter in module.parameters(recurse=False):
        nn.init.constant_(parameter, value)


def test_a_snapshot_is_of_the_start_of_the_period():
    model = network(1.0)
    past = copy_past('snapshot', model, mode='train', ema_decay=0.9)
    assert isinstance(past, SnapshotPast)
    assert past.predict(LABELS) is None
    past.begin_forward(lambda copy: pytest.fail('there is no past to ask yet'))
    _fill(model[0], 2.0)
    past.begin_period(model)
    _fill(model[0], 3.0)
    past.begin_step(0)
    past.begin_forward(lambda copy: copy[0].weight.clone())
    assert past.predict(LABELS).probs.tolist() == [[2.0], [2.0]]
    assert past.predict(LABELS).known is True
    assert past.state_dict(mid_period=False) == {}  # the saved weights are the next snapshot


def test_a_loss_without_a_forward_pass_is_an_error():
    past = SnapshotPast(network(1.0))
    past.begin_period(network(1.0))
    past.begin_step(0)
    with pytest.raises(RuntimeError, match='without a forward pass'):
        past.predict(LABELS)


def test_the_average_forgets_the_initial_weights():
    model, past = network(0.0), None
    past = copy_past('ema', model, mode='train', ema_decay=0.5)
    expected = 0.0
    for update, value in enumerate((4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0), 1):
        _fill(model[0], value)
        past.after_update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
        assert past.model[0].weight.flatten().tolist() == pytest.approx([expected] * 2)
    assert not past.ready
    past.begin_period(model)
    assert past.ready


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_small_steps_are_not_lost_in_half_precision(dtype):
    model = network(0.0).to(dtype)
    past = AveragePast(model, decay=0.999)
    _fill(model[0], 1.0)
    expected = 0.0
    for update in range(1, 1001):
        if update == 500:  # resumed
            again = AveragePast(network(5.0).to(dtype), decay=0.999)
            again.load_state_dict(past.state_dict())
            past = again
        past.after_update(model)
        decay = min(0.999, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay)
    assert past.model[0].weight.dtype == dtype
    assert past.model[0].weight.float().flatten().tolist() == pytest.approx([expected] * 2, rel=1e-2)


def test_buffers_of_the_average_are_the_models():
    model = network(0.0)
    past = AveragePast(model)
    model[1].running_mean.fill_(7.0)
    past.after_update(model)
    assert past.model[1].running_mean.tolist() == [7.0, 7.0]


@pytest.mark.parametrize('decay', [1.0, -0.1])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r'ema_decay: must lie in \[0, 1\)'):
        AveragePast(network(0.0), decay=decay)


def pasts():
    model = network(1.0)
    tokens_seen = tokens()
    steps(tokens_seen, torch.randn(6, 5), rows=torch.tensor([0, 1]), labels=torch.tensor([[1, 2, 3], [4, 1, -100]]))
    bank_seen = bank_past()
    steps(bank_seen, torch.randn(2, 2))
    copies = [SnapshotPast(model), AveragePast(model)]
    for past in copies:
        _fill(model[0], 2.0)
        past.after_update(model)
        past.begin_period(model)
    return [bank_seen, tokens_seen, *copies]


@pytest.mark.parametrize('i', range(4))
def test_states_are_restored(tmp_path, i):
    past = pasts()[i]
    other = [bank_past, tokens, lambda: SnapshotPast(network(0.0)), lambda: AveragePast(network(0.0))][i]()
    torch.save(past.state_dict(), tmp_path / 'state.pt')
    other.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    ours, theirs = past.state_dict(), other.state_dict()
    assert str(ours) == str(theirs)


def test_the_state_of_another_teacher_is_refused():
    states = [past.state_dict() for past in pasts()]
    kinds = ['bank', 'bank', 'snapshot', 'ema']
    for past, kind in zip(
        [bank_past(), SnapshotPast(network(0.0)), AveragePast(network(0.0))], ['bank', 'snapshot', 'ema']
    ):
        past.load_state_dict({})
        for state, saved in zip(states, kinds):
            if saved != kind:
                with pytest.raises(ValueError, match=f"of teacher='{saved}', and this run's of teacher='{kind}'"):
                    past.load_state_dict(state)


def test_auto_says_what_it_takes(caplog):
    with caplog.at_level('INFO'):
        assert choose_teacher('auto', None) == 'bank'
        assert choose_teacher('auto', 'Mixup mixes samples') == 'snapshot'
        assert choose_teacher('ema', 'Mixup mixes samples') == 'ema'
    assert ['takes the bank' in caplog.messages[0], 'Mixup mixes' in caplog.messages[1], len(caplog.messages)] == [
        True,
        True,
        2,
    ]


def test_a_training_without_a_past_is_refused():
    refuse_without_past('PSKD', 9, 10, 'steps', period_is='interval', way_out='raise max_steps')
    with pytest.raises(
        ValueError, match=r'the first 9 steps \(interval\) have no past.*after 9.*raise max_steps.*alpha=0'
    ):
        refuse_without_past('PSKD', 9, 9, 'steps', period_is='interval', way_out='raise max_steps')
