"""Schedules at their ends, and the snapshot teacher's independence of its student."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from selfkd.schedule import linear_growth, sigmoid_ramp_up
from selfkd.teacher import SnapshotTeacher


def test_schedules_at_their_ends():
    assert [linear_growth(0.8, s) for s in (0, 0.5, 1)] == pytest.approx([0, 0.4, 0.8])
    assert sigmoid_ramp_up(0) == pytest.approx(0.006738, rel=1e-3)  # exp(-5)
    assert sigmoid_ramp_up(1) == 1
    for schedule in (lambda s: linear_growth(0.8, s), sigmoid_ramp_up):
        with pytest.raises(ValueError, match=r'progress: must lie in \[0, 1\], got 1.01'):
            schedule(1.01)


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2))


def test_in_eval_mode_it_is_without_noise_and_follows_only_update():
    x, model = torch.randn(2, 3, 5, 5), small_net()
    model(x)
    teacher = SnapshotTeacher(model, mode='eval')
    random_state, expected = torch.get_rng_state(), copy.deepcopy(model).eval()(x)
    model[0].weight.data.add_(1)
    model(x)  # the student's batch-norm statistics move on
    torch.set_rng_state(random_state)
    torch.testing.assert_close(teacher(x), expected)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not teacher(x).requires_grad
    teacher.update(model)
    torch.testing.assert_close(teacher(x), copy.deepcopy(model).eval()(x))
    assert model.training


def test_a_copys_weights_require_gradients_as_the_models_and_take_none_along():
    """F.linear goes another, slower way for weights that need none where its input is not contiguous."""
    model = nn.Linear(2, 3)
    model(torch.randn(4, 2)).sum().backward()
    model.bias.requires_grad_(False)
    copied = SnapshotTeacher(model).model
    assert (copied.weight.requires_grad, copied.bias.requires_grad) == (True, False)
    assert copied.weight.grad is None


def test_in_train_mode_dropout_is_drawn_anew_from_the_step():
    x, model = torch.ones(4, 50), nn.Dropout(0.5)
    teacher = SnapshotTeacher(nn.Sequential(nn.Linear(50, 50), model))
    state = torch.get_rng_state()
    teacher.begin_step(7)
    first, second = teacher(x), teacher(x)
    teacher.begin_step(8)
    other = teacher(x)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own numbers are the student's
    for a, b in ((first, second), (first, other)):
        assert ((a == 0) != (b == 0)).float().mean() > 0.2
    torch.manual_seed(1)  # whatever else was drawn in between
    teacher.begin_step(7)
    assert torch.equal(teacher(x), first)
    assert torch.equal(teacher.run(teacher.model.forward, x), second)
    assert not first.requires_grad


def test_in_train_mode_batch_norm_is_by_the_batch_and_keeps_no_account():
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, affine=False))
    model[1].eval()  # frozen by its owner: stays in evaluation mode, as in the student
    with torch.no_grad():
        model[0].running_mean.fill_(7)
        model[1].running_mean.fill_(5)
    teacher = SnapshotTeacher(model)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    x = 100 + torch.randn(64, 3)
    out = teacher(x)
    torch.testing.assert_close(out.mean(0), torch.full((3,), -5.0), rtol=0, atol=1e-3)  # the batch's mean, then 5
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    model(x)  # the student's own account goes on
    assert model[0].running_mean[0] > 7
    teacher.update(model)
    assert torch.equal(teacher.model[0].running_mean, model[0].running_mean)
    model[1].train()  # its owner thaws it
    torch.testing.assert_close(teacher(x).mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    model.eval()  # a loop may train the whole network in evaluation mode
    torch.testing.assert_close(teacher(x), model(x))


def test_a_copy_of_a_model_in_evaluation_mode_trains_with_it():
    """Hooks may make the copy while the student is still as validation left it."""
    model, x = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Dropout()).eval(), 100 + torch.randn(64, 3)
    teacher = SnapshotTeacher(model)
    teacher.update(model)
    model.train()
    out = teacher(x)
    assert (out == 0).any()
    assert out.mean().abs() < 1


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"SnapshotTeacher: mode must be one of \['train', 'eval'\], got 'test'"):
        SnapshotTeacher(nn.Linear(2, 2), mode='test')


def test_teacher_is_no_submodule_of_its_holder():
    model = small_net()
    model(torch.randn(2, 3, 5, 5))
    names = list(model.state_dict())
    model.teacher = SnapshotTeacher(model)
    assert list(model.state_dict()) == names


def test_teacher_state_round_trip():
    model = nn.Linear(2, 2)
    teacher, other = SnapshotTeacher(model), SnapshotTeacher(nn.Linear(2, 2))
    other.load_state_dict(teacher.state_dict())
    torch.testing.assert_close(other(torch.ones(1, 2)), teacher(torch.ones(1, 2)))


def test_weight_norm_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.out.weight = self.embed.weight
            self.hidden = nn.utils.weight_norm(nn.Linear(4, 4))

        def forward(self, ids):
            return self.out(self.hidden(self.embed(ids)))

    model, ids = Tied(), torch.arange(5)
    model(ids).sum().backward()  # leaves a non-leaf tensor in the module, which plain deepcopy refuses
    teacher = SnapshotTeacher(model)
    assert teacher.model.out.weight is teacher.model.embed.weight
    with torch.no_grad():
        model.embed.weight.mul_(2)
        model.hidden.weight_g.mul_(3)
    teacher.update(model)
    torch.testing.assert_close(teacher(ids), model(ids))


def test_self_teachers_stay_out():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].self_teacher = nn.Linear(3, 3)
    teacher = SnapshotTeacher(model)
    assert list(teacher.state_dict()) == ['0.weight', '0.bias']
    with torch.no_grad():
        model[0].weight.add_(1)
    teacher.update(model)
    torch.testing.assert_close(teacher(torch.ones(1, 2)), model(torch.ones(1, 2)))
    assert isinstance(model[0].self_teacher, nn.Linear)


def test_another_model_is_refused():
    with pytest.raises(ValueError, match='is not the model that this teacher was made from'):
        SnapshotTeacher(nn.Linear(2, 2)).update(nn.Linear(2, 3))


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_random_states_of_torch_numpy_and_python_are_left_alone(mode):
    """Also in evaluation mode: some models draw from NumPy there, too (layer drop in fairseq's wav2vec)."""

    class Draws(nn.Linear):
        def forward(self, x):
            return torch.stack([torch.rand(()), torch.tensor(np.random.rand()), torch.tensor(random.random())])

    teacher, states = SnapshotTeacher(Draws(2, 2), mode=mode), []
    for called in (False, True):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        teacher.begin_step(3)
        drawn = (teacher(torch.ones(2)), teacher(torch.ones(2))) if called else None
        states.append((torch.rand(()).item(), np.random.rand(), random.random()))
    assert states[0] == states[1]
    assert not (drawn[0] == drawn[1]).any()  # each call has its own noise ...
    teacher.begin_step(3)
    assert torch.equal(teacher(torch.ones(2)), drawn[0])  # ... that follows from the step


def test_a_copy_that_somebody_else_keeps_is_not_copied():
    student = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    average = copy.deepcopy(student).eval()
    teacher = SnapshotTeacher(average, copy_model=False)
    teacher.follow(student)
    assert teacher.model is average
    before = copy.deepcopy(average.state_dict())
    teacher(torch.randn(8, 2))
    assert average.training  # the student's mode, whatever its owner left it in
    assert all(torch.equal(before[name], value) for name, value in average.state_dict().items())


def test_a_forward_of_the_models_own_would_be_the_students():
    def wrapped(model):
        forward = model.forward
        model.forward = lambda x: forward(x)
        return model

    with pytest.raises(ValueError, match=r'^0.forward was set on the module itself .*torch.compile\(model\)'):
        SnapshotTeacher(nn.Sequential(wrapped(nn.Linear(2, 2))))
