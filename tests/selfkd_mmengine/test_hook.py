"""What every hook refuses before the first step, and what it logs."""

import json

import pytest
from helpers.mmengine import Recorder, by_iterations, digits_config, train

from selfkd.bank import PredictionBank

PSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)
SNAPSHOT = dict(PSKD, teacher='snapshot')
HOOKS = ('PSKDHook', 'CSKDHook', 'TFKDHook', 'DDGSDHook')


def refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        train(cfg)


# PS-KD that would never act


@pytest.mark.parametrize('hook', [PSKD, SNAPSHOT])
def test_one_epoch_is_refused(digits, tmp_path, hook):
    cfg = digits_config(digits, tmp_path, hook, **{'train_cfg.max_epochs': 1})
    refused(cfg, 'the first of the epochs has no past, .* ends after 1, so it would be plain: raise max_epochs, or')


@pytest.mark.parametrize(
    ('hook', 'iterations', 'message'),
    [
        (PSKD, 5, r"first 5 iterations \(.* one pass .* ends after 5, .* raise max_iters, or set teacher='snapshot'"),
        (SNAPSHOT, 4, r'the first 5 iterations .* raise max_iters, or set .* an interval below 4'),
        (dict(SNAPSHOT, interval=6), 6, r'the first 6 iterations .* have no past, and training ends after 6'),
        (dict(SNAPSHOT, teacher='ema'), 5, r'the first 5 iterations .* have no past'),
    ],
)
def test_a_period_that_training_does_not_outlast_is_refused(digits, tmp_path, hook, iterations, message):
    refused(by_iterations(digits_config(digits, tmp_path, hook), iterations), message)


@pytest.mark.parametrize(('hook', 'iterations'), [(PSKD, 6), (dict(SNAPSHOT, interval=1), 2)])
def test_the_shortest_training_that_is_not_refused_acts(digits, tmp_path, hook, iterations):
    train(by_iterations(digits_config(digits, tmp_path, hook), iterations), recorder := Recorder())
    assert [step['pskd_soft'] > 0 for step in recorder.steps] == [False] * (iterations - 1) + [True]


def test_with_alpha_0_nothing_is_expected_of_it(digits, tmp_path):
    train(digits_config(digits, tmp_path, dict(PSKD, alpha=0), **{'train_cfg.max_epochs': 1}), recorder := Recorder())
    assert [step['loss'] for step in recorder.steps] == [step['plain'].item() for step in recorder.steps]


@pytest.mark.parametrize('alpha', [0.8, 0.0])
def test_a_training_that_may_end_early_is_told_that_alpha_will_not_get_there(digits, tmp_path, alpha):
    stop = dict(type='EarlyStoppingHook', monitor='accuracy/top1', patience=1, min_delta=200)
    options = {'train_cfg.val_interval': 1, 'train_cfg.max_epochs': 5, 'log_level': 'WARNING'}
    runner = train(digits_config(digits, tmp_path, dict(PSKD, alpha=alpha), stop, **options))
    assert runner.epoch < 5
    logs = ''.join(path.read_text() for path in tmp_path.rglob('*.log'))
    assert ('alpha grows up to 0.8 over all of training; where EarlyStoppingHook ends' in ' '.join(logs.split())) == (
        alpha > 0
    )


# One method twice


@pytest.mark.parametrize('name', HOOKS)
def test_one_method_twice_is_refused(digits, tmp_path, name):
    """A line of the config and an option of the command line, one with the plugin's name and one with the toolkit's."""
    __import__('selfkd_mmpretrain')
    cfg = digits_config(digits, tmp_path, dict(type=f'selfkd_mmpretrain.{name}'))
    cfg.merge_from_dict({'default_hooks.again.type': f'mmpretrain.{name}'})
    refused(cfg, f'{name}: this run has it twice .* remove one of the two')


def test_a_method_and_what_was_made_from_it_are_one_method_twice(digits, tmp_path):
    from selfkd_mmpretrain import PSKDHook

    class Mine(PSKDHook):
        pass

    refused(digits_config(digits, tmp_path, PSKD, dict(type=Mine)), 'PSKDHook: this run has it twice')


def test_validation_does_not_mind(digits, tmp_path):
    from mmengine.runner import Runner

    cfg = digits_config(digits, tmp_path, PSKD, PSKD)
    assert Runner.from_cfg(cfg).val()


# The log


@pytest.mark.parametrize('hook', [PSKD, dict(SNAPSHOT, alpha=0.5), dict(type='selfkd_mmpretrain.TFKDHook')])
def test_logged_parts_are_averaged_as_the_loss_is(digits, tmp_path, hook):
    """The log shows every third step; what it shows is the mean over the log processor's window."""
    cfg = digits_config(digits, tmp_path, hook, log_processor=dict(window_size=4))
    cfg.default_hooks.logger.interval = 3
    train(cfg, recorder := Recorder())
    lines = [json.loads(line) for line in next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    lines = [line for line in lines if 'loss' in line]
    assert [line['step'] for line in lines] == [3, 8, 13]
    for line in lines:
        window = recorder.steps[max(0, line['step'] - 4) : line['step']]
        for name in {'loss', 'pskd_hard', 'pskd_soft', 'pskd_entropy', 'tfkd_kl'} & line.keys():
            mean = sum(step[name] for step in window) / len(window)
            assert line[name] == pytest.approx(mean, rel=1e-5), name
        if 'pskd_hard' in line:
            assert line['pskd_hard'] + line['pskd_soft'] == pytest.approx(line['loss'], rel=1e-5)
            assert line['pskd_alpha'] == pytest.approx(window[-1]['pskd_alpha'])  # not of the window: as it is now


def test_predictions_that_are_not_finite_are_counted_in_the_log(digits, tmp_path, monkeypatch):
    """They can be on an accelerator only, where nobody waits to look; a number stands in for what it counts there."""
    monkeypatch.setattr(PredictionBank, 'skipped', 3)
    train(digits_config(digits, tmp_path, PSKD), recorder := Recorder())
    assert recorder.steps[-1]['pskd_skipped'] == 3


def test_a_network_that_has_diverged_is_told_from_a_wrong_argument(digits, tmp_path):
    cfg = digits_config(digits, tmp_path, PSKD)
    cfg.optim_wrapper.optimizer.lr = 1e30
    refused(cfg, 'training has diverged')
