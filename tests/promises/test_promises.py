"""What every plugin promises, once for all: each test runs over the whole table."""

import pytest
import torch
from table import rows

SCHEDULE = ('pskd_alpha', 'alpha', 'ramp', 'self_teacher.ramp')  # names in the logs


def same(a, b):
    """Dicts of tensors that are equal to the last bit, and of names."""
    assert a.keys() == b.keys()
    for name in a:
        equal = (
            a[name] == b[name] if isinstance(a[name], str) else torch.equal(*map(torch.as_tensor, (a[name], b[name])))
        )
        assert equal, name


def in_logs(run, name):
    """A logged value in each step; -1 where it is not logged."""
    values = [step.get(name) for step in run['steps']]
    return [-1.0 if value is None else value for value in values]


@rows()
def test_it_acts_and_weight_zero_is_plain_training_to_the_last_bit(row, runs):
    plain, on = runs.train(runs.config(on=False)), runs.train(runs.config())
    first, last = (runs.total(on['steps'][i]) - runs.total(plain['steps'][i]) for i in (0, -1))
    assert (first != 0) == row.acts_at_once
    assert abs(last) > 1e-6
    assert any((on['weights'][name] != value).any() for name, value in plain['weights'].items())
    if row.zero is not None:
        zero = runs.train(runs.config(settings=row.zero))
        same(zero['weights'], plain['weights'])
        assert [runs.total(step) for step in zero['steps']] == [runs.total(step) for step in plain['steps']]


@rows()
def test_the_published_file_is_the_plain_models_in_the_toolkits_own_inference(row, runs, tmp_path):
    plain, cfg = runs.config(on=False), runs.config()
    trained = runs.train(cfg)
    published = str(tmp_path / 'published.pth')
    weights, dropped = runs.publish(trained, published)
    assert len(trained['weights']) - len(weights) == dropped
    same(weights, {name: trained['weights'][name] for name in weights})
    runs.load_strictly(plain, weights)
    found, classes = runs.predictions(plain, published)
    theirs, their_classes = runs.predictions(cfg, trained['checkpoint'])
    assert len(found)
    assert torch.equal(found, theirs)
    assert classes == their_classes == runs.classes


@rows(loops=True)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(row, runs, loop):
    straight = runs.train(runs.killable(runs.config(loop=loop)))
    steps = len(straight['steps'])
    cfg = runs.killable(runs.config(loop=loop))
    runs.train(cfg, kill_at=steps - steps // 4)
    resumed = runs.train(cfg, resume=True)
    assert 0 < len(resumed['steps']) < steps
    assert resumed['steps'] == straight['steps'][-len(resumed['steps']) :]
    same(resumed['weights'], straight['weights'])
    if straight['bank']:
        same(resumed['bank'], straight['bank'])


@rows(loops=True)
def test_two_processes_agree_and_count_as_one_with_their_whole_batch(row, runs, loop):
    alone = runs.train(runs.config(loop=loop))
    ranks = runs.train(runs.config(loop=loop, batch=runs.batch // 2), processes=2)
    for name in runs.trained(ranks[0]['weights']):
        assert torch.equal(ranks[0]['weights'][name], ranks[1]['weights'][name]), name
    if alone['bank']:
        same(ranks[0]['bank'], ranks[1]['bank'])
        assert torch.equal(ranks[0]['bank']['seen'], alone['bank']['seen'])
    if alone['teacher']:
        for name in runs.trained(ranks[0]['teacher']):  # an average has its student's statistics, each rank its own
            assert torch.equal(ranks[0]['teacher'][name], ranks[1]['teacher'][name]), name
    for logged in SCHEDULE:
        values = in_logs(alone, logged)
        # The mean over an epoch of what grows within it depends on how the epoch is batched, most so in the first one.
        near = runs.batching * max(values) / 10 + 1e-9
        for rank in ranks:
            assert in_logs(rank, logged) == pytest.approx(values, rel=runs.batching, abs=near)


@rows(where=lambda row: row.toolkit.accumulates)
def test_accumulated_steps_do_not_advance_the_schedule_twice(row, runs):
    once = runs.train(runs.config())
    twice = runs.train(runs.accumulate(runs.config(batch=runs.batch // 2)))
    per_epoch = len(once['steps']) // runs.epochs
    for logged in SCHEDULE:
        values = [step.get(logged) for step in once['steps'][::per_epoch]]
        assert [step.get(logged) for step in twice['steps'][:: len(twice['steps']) // runs.epochs]] == values


@rows(where=lambda row: row.toolkit.casts)
def test_mixed_precision(row, runs):
    cfg, plain = (runs.bfloat16(runs.config(on=on)) for on in (True, False))
    on, off = runs.train(cfg), runs.train(plain)
    assert all(torch.isfinite(torch.tensor(runs.total(step))) for step in on['steps'])
    assert abs(runs.total(on['steps'][-1]) - runs.total(off['steps'][-1])) > 1e-6
    assert all(value.dtype != torch.bfloat16 for value in on['weights'].values())


@rows(where=lambda row: row.hooks)
def test_one_method_twice_is_refused(row, runs):
    cfg = runs.config()
    name = row.hooks[0]['type'].split('.')[-1]
    cfg.merge_from_dict({f'default_hooks.again.{key}': value for key, value in row.hooks[0].items()})
    with pytest.raises(AssertionError, match=f'{name}: .*(twice|two|already|once)'):
        runs.train(cfg)


@rows(where=lambda row: row.hooks)
def test_a_tap_that_does_not_fire_is_an_error(row, runs):
    with pytest.raises(AssertionError, match=r'was never called while\s+the model computed its loss'):
        runs.train(runs.config(), hooks=[runs.bypass()])


@rows(where=lambda row: row.toolkit.validates and row.validates)
def test_a_validation_loss_is_plain(row, runs):
    """With the method on and frozen weights, a validation loss computed in the toolkit's usual way is the plain one."""
    plain, on = (runs.validation_losses(runs.config(on=on)) for on in (False, True))
    assert len(plain) > 1
    assert on == pytest.approx(plain, rel=1e-5)


@rows(where=lambda row: row.knows_samples)
def test_a_moved_sample_is_refused(row, runs):
    with pytest.raises(AssertionError, match=r'(Value|Runtime)Error: [\s\S]*\bsamples?\b'):
        runs.train(runs.shuffle_within_batches(runs.config()))


@rows(where=lambda row: row.toolkit.passes)
def test_a_loss_belongs_to_its_forward_pass(row, runs):
    """The network is called on other inputs as well before the loss, as for two views of a sample."""
    one, two = runs.train(runs.config()), runs.train(runs.two_passes(runs.config()))
    assert [runs.total(step) for step in two['steps']] == [runs.total(step) for step in one['steps']]
