"""A large bank in a file of its own beside the checkpoints."""

import pytest
import torch

from selfkd import past_bank
from selfkd.bank import PredictionBank
from selfkd.past import BankPast


@pytest.fixture(autouse=True)
def every_bank_is_large(monkeypatch):
    monkeypatch.setattr(past_bank, 'LARGE', 1)


def past_of(folder, step, value=0.0):
    past = BankPast(PredictionBank(2, 2), way_out='')
    past.begin_step(0, torch.tensor([1]))
    past.observe(torch.tensor([[value, 0.0]]))
    past.side.place = (str(folder), step)
    return past


def rows(past):
    return past.bank.read(torch.tensor([1]))


def test_a_state_is_part_of_the_checkpoint_where_no_folder_is_known(tmp_path):
    past = past_of(tmp_path, 'epoch 1')
    past.side.place = None
    assert 'values' in past.state_dict()['bank']


def test_the_two_newest_checkpoints_have_their_bank(tmp_path):
    past, states = past_of(tmp_path, 'epoch 0'), []
    for epoch in range(1, 4):
        past.observe(torch.tensor([[float(epoch), 0.0]]))
        past.side.place = (str(tmp_path), f'epoch {epoch}')
        states.append((past.state_dict(), rows(past)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['selfkd_bank_1.pth', 'selfkd_bank_2.pth']
    for state, expected in states[1:]:
        again = past_of(tmp_path, '')
        again.load_state_dict(state)
        assert torch.equal(rows(again), expected)
    with pytest.raises(ValueError, match='checkpoint is of epoch 1.*selfkd_bank_1.pth holds that of epoch 3. Only the'):
        past_of(tmp_path, '').load_state_dict(states[0][0])


def test_after_resuming_the_bank_of_the_resumed_checkpoint_is_the_last_to_be_replaced(tmp_path):
    """A resumed run that is killed while it saves again must still find it."""
    past = past_of(tmp_path, 'epoch 1', 1.0)
    first, expected = past.state_dict(), rows(past)
    past.side.place = (str(tmp_path), 'epoch 2')
    past.state_dict()  # killed before the checkpoint of epoch 2 was written
    for _ in range(2):
        resumed = past_of(tmp_path, '')
        resumed.load_state_dict(first)
        assert torch.equal(rows(resumed), expected)
        resumed.side.place = (str(tmp_path), 'epoch 2')
        resumed.state_dict()


def test_the_resumed_checkpoint_may_be_named_by_a_link(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'run')
    state = past_of(tmp_path / 'run', 'epoch 1', 1.0).state_dict()
    resumed = past_of(tmp_path / 'link', '')
    resumed.load_state_dict(state)
    resumed.side.place = (str(tmp_path / 'run'), 'epoch 2')
    resumed.state_dict()  # killed before the checkpoint of epoch 2 was written
    past_of(tmp_path / 'link', '').load_state_dict(state)


def test_a_step_is_written_once(tmp_path):
    past = past_of(tmp_path, 'epoch 1')
    state = past.state_dict()
    (tmp_path / 'selfkd_bank_1.pth').unlink()
    assert past.state_dict() == state
    assert not list(tmp_path.iterdir())


def test_the_folder_may_move(tmp_path):
    past = past_of(tmp_path / 'there', 'epoch 1', 1.0)
    (tmp_path / 'there').mkdir()
    state = past.state_dict()
    (tmp_path / 'there').rename(tmp_path / 'here')
    again = past_of(tmp_path / 'here', '')
    again.load_state_dict(state)
    assert torch.equal(rows(again), rows(past))
    (tmp_path / 'here' / 'selfkd_bank_1.pth').unlink()
    with pytest.raises(ValueError, match='selfkd_bank_1.pth is not there'):
        again.load_state_dict(state)


def test_the_bank_of_another_run_is_refused(tmp_path):
    state = past_of(tmp_path, 'epoch 1').state_dict()
    past_of(tmp_path, 'epoch 1').state_dict()
    with pytest.raises(ValueError, match='holds that of epoch 1 of another run'):
        past_of(tmp_path, '').load_state_dict(state)


def test_a_bank_is_not_copied_to_be_written():
    bank = PredictionBank(2, 2)
    assert bank.state_dict(copy=False)['values'].data_ptr() == bank._tables[0].data_ptr()
    assert bank.state_dict()['values'].data_ptr() != bank._tables[0].data_ptr()
