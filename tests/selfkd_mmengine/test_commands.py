"""`selfkd train` and `selfkd report` on files that are not there, not whole, or in the way."""

import json

import pytest
import torch
from helpers.mmengine import digits_config
from mmengine.logging import MMLogger

from selfkd.cli import main
from selfkd_mmpretrain.report import check_runs, finished_run


def finished(folder, digits, seed=0):
    """What a finished run leaves: config, checkpoint and last_checkpoint. Its model was never trained."""
    folder.mkdir()
    cfg = digits_config(digits, folder, **{'randomness.seed': seed})
    cfg.dump(folder / 'config.py')
    torch.save({'meta': {}, 'state_dict': {'weight': torch.ones(3)}}, folder / 'epoch_1.pth')
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_1.pth'))
    return folder


def refused(capsys, *arguments):
    with pytest.raises(SystemExit, match='2'):
        main([str(argument) for argument in arguments])
    return capsys.readouterr().err


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


def remove(file):
    file.unlink()


@pytest.mark.parametrize(
    ('file', 'change', 'message'),
    [
        ('config.py', remove, 'found 0 configs'),
        ('config.py', cut, 'config.py: is no config, or not a whole one'),
        ('last_checkpoint', remove, 'last_checkpoint missing'),
        ('last_checkpoint', lambda file: file.write_text(''), 'last_checkpoint empty'),
        ('epoch_1.pth', remove, 'its checkpoint is not there any more'),
        ('epoch_1.pth', cut, 'epoch_1.pth: is no checkpoint, or not a whole one'),
    ],
)
def test_a_report_looks_at_all_runs_before_it_tests_the_first(
    digits, tmp_path, capsys, monkeypatch, file, change, message
):
    """The last of the runs is broken. Nothing is tested, and the message names the run."""
    monkeypatch.setattr('selfkd_mmpretrain.report.predict', lambda *args, **options: pytest.fail('tested a run'))
    a, b = (finished(tmp_path / name, digits) for name in 'ab')
    change(b / file)
    text = refused(capsys, 'report', tmp_path / 'out', f'plain={a}', f'PS-KD={b}')
    assert message in text
    assert f'{tmp_path}/b' in text


def test_a_report_that_could_not_be_compared_or_written_is_refused_before_the_tests(
    digits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr('selfkd_mmpretrain.report.predict', lambda *args, **options: pytest.fail('tested a run'))
    a, b, c = (finished(tmp_path / name, digits, seed) for name, seed in (('a', 0), ('b', 1), ('c', 1)))
    text = refused(capsys, 'report', tmp_path / 'out', f'plain={a},{b}', f'PS-KD={b},{c}')
    assert 'PS-KD: runs are compared seed by seed, and several have the same one: [1, 1]' in text
    check_runs({'plain': [str(a), str(b)]})
    assert finished_run(str(a))[1] == str(a / 'epoch_1.pth')
    (tmp_path / 'file').write_text('')
    assert f'{tmp_path}/file' in refused(capsys, 'report', tmp_path / 'file', f'plain={a}')
    assert '--ood: none is no folder' in refused(capsys, 'report', tmp_path / 'out', f'plain={a}', '--ood', 'none')


def test_training_does_not_start_from_a_checkpoint_that_is_not_whole(digits, tmp_path, capsys):
    run = finished(tmp_path / 'run', digits)
    train = ['train', run / 'config.py', '--work-dir', run]
    assert 'none.pth' in refused(capsys, *train, '--resume', run / 'none.pth')
    assert 'none.pth' in refused(capsys, *train, '--cfg-options', f'load_from={run}/none.pth')
    cut(run / 'epoch_1.pth')
    for options in (['--resume'], ['--resume', run / 'epoch_1.pth'], ['--cfg-options', f'load_from={run}/epoch_1.pth']):
        assert f'{run}/epoch_1.pth: is not a whole checkpoint, it was cut' in refused(capsys, *train, *options)
    (run / 'last_checkpoint').write_text('')
    assert 'last_checkpoint: is empty, name a checkpoint after --resume' in refused(capsys, *train, '--resume')
    (tmp_path / 'file').write_text('')
    assert f'{tmp_path}/file' in refused(capsys, 'train', run / 'config.py', '--work-dir', tmp_path / 'file')


PSKD = 'selfkd_mmpretrain.PSKDHook'


@pytest.fixture
def in_process(monkeypatch):
    """`selfkd train` sets LOCAL_RANK for good, which accelerate would take for a launch of several processes."""
    monkeypatch.setenv('LOCAL_RANK', '0')


def test_a_section_that_nothing_reads_is_refused(digits, tmp_path, in_process):
    """A variable of the config is no such section, where it is used in one that is read."""
    cfg = digits_config(digits, tmp_path / 'run', **{'train_cfg.max_epochs': 2})
    cfg.dump(tmp_path / 'config.py')
    options = ['--cfg-options', f'default_hook.pskd.type={PSKD}']
    with pytest.raises(ValueError, match='default_hook: asks for selfkd_mmpretrain.PSKDHook, and no part of MMEngine'):
        main(['train', str(tmp_path / 'config.py'), *options])
    cfg.own_hook = dict(type=PSKD)
    cfg.default_hooks.pskd = cfg.own_hook
    cfg.dump(tmp_path / 'config.py')
    main(['train', str(tmp_path / 'config.py')])
    assert 'pskd_alpha' in scalars(tmp_path / 'run')[-1]


def scalars(folder):
    lines = [line for file in sorted(folder.glob('*/vis_data/scalars.json')) for line in file.read_text().splitlines()]
    return [line for line in map(json.loads, lines) if 'loss' in line]


@pytest.mark.parametrize(('kind', 'logged'), [('PSKDHook', 'pskd_soft'), ('CSKDHook', 'loss_cskd')])
def test_resuming_without_the_hook_says_so_and_does_not_repeat_its_numbers(
    digits, tmp_path, in_process, monkeypatch, kind, logged
):
    """And with it again: it acts."""
    warnings = []
    monkeypatch.setattr(MMLogger, 'warning', lambda self, text, *args, **options: warnings.append(text))
    cfg = digits_config(digits, tmp_path / 'run', **{'default_hooks.logger.interval': 1})
    cfg.dump(tmp_path / 'config.py')
    train = ['train', str(tmp_path / 'config.py'), '--cfg-options']
    main([*train, 'train_cfg.max_epochs=2', f'default_hooks.ours.type=selfkd_mmpretrain.{kind}'])
    assert logged in scalars(tmp_path / 'run')[-1]
    again = [*train[:2], '--work-dir', str(tmp_path / 'again'), '--resume', str(tmp_path / 'run/epoch_2.pth')]
    # mmengine names a run after the second that it began in, and would write into the first run's folder.
    main([*again, '--cfg-options', 'experiment_name=again'])
    assert len(scalars(tmp_path / 'again')) == 5
    assert not any(logged[-4:] in name for line in scalars(tmp_path / 'again') for name in line)
    assert any(f'was trained with {kind}, and this config has no such hook' in text for text in warnings)
    on = [*train[:2], '--work-dir', str(tmp_path / 'on'), '--resume', str(tmp_path / 'again/epoch_3.pth')]
    options = ['experiment_name=on', 'train_cfg.max_epochs=5', f'default_hooks.ours.type=selfkd_mmpretrain.{kind}']
    main([*on, '--cfg-options', *options])
    assert scalars(tmp_path / 'on')[-1][logged] > 0
