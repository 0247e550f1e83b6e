"""`selfkd compare`, on logs as the toolkits write them and as a killed run leaves them."""

import json

import pytest

from selfkd.cli import main
from selfkd.runs import columns_of, logged_measures


def mmengine_run(folder, accuracy, seed=None, cut=None):
    """A log of two evaluations beside its config; ``cut`` is what a killed run left of a third."""
    data = folder / '20260101_000000/vis_data'
    data.mkdir(parents=True)
    lines = [{'lr': 0.1, 'loss': 1.0, 'step': 1}]
    lines += [{'accuracy/top1': value, 'calibration/ece': 3.0, 'step': 2} for value in (0.0, accuracy)]
    (data / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)) + '\n' + (cut or ''))
    (data / 'config.py').write_text(f'randomness = dict(deterministic=False, seed={seed})\n')
    return str(folder)


def compare(capsys, *arguments):
    main(['compare', *map(str, arguments)])
    return capsys.readouterr()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit, match='2'):
        main(['compare', *map(str, arguments)])
    return capsys.readouterr().err


def test_a_name_given_twice_has_the_runs_of_both(tmp_path, capsys):
    a, b, c = (
        mmengine_run(tmp_path / name, value, seed) for name, value, seed in (('a', 1, 0), ('b', 3, 1), ('c', 2, 0))
    )
    out = compare(capsys, tmp_path / 'out', f'plain={a}', f'plain={b}', f'PS-KD={c}').out
    assert '| plain | 2    | 2.000 ± 1.414 |' in out
    assert '| PS-KD | 1    |' in out
    assert 'with the same seed (paired t)' in (tmp_path / 'out/table.md').read_text()


def test_what_would_count_a_run_twice_or_none_is_refused(tmp_path, capsys):
    a = mmengine_run(tmp_path / 'a', 1)
    assert 'a run counts once in plain, and one is named twice' in refused(capsys, tmp_path / 'out', f'plain={a},{a}')
    assert 'named twice' in refused(capsys, tmp_path / 'out', f'plain={a}', f'plain={a}/../a')
    for groups in ('plain=', f'plain={a},', f'={a}', a):
        assert 'must be NAME=WORK_DIR' in refused(capsys, tmp_path / 'out', groups)


def test_runs_without_a_seed_are_not_said_to_have_one(tmp_path, capsys):
    runs = [mmengine_run(tmp_path / name, value) for name, value in (('a', 1), ('b', 3), ('c', 2), ('d', 5))]
    compare(capsys, tmp_path / 'out', f'plain={runs[0]},{runs[1]}', f'x={runs[2]},{runs[3]}')
    text = (tmp_path / 'out/table.md').read_text()
    assert 'in the order given, as not every run has a seed' in text
    assert 'same seed' not in text


@pytest.mark.parametrize('cut', ['{"accuracy/top1": 9', '{"accuracy/top1": 9{"accuracy/top1": 5.0, "step": 4}', '12'])
def test_a_killed_runs_broken_line_is_left_out_with_a_word(tmp_path, capsys, cut):
    a = mmengine_run(tmp_path / 'a', 7, cut=cut)
    assert logged_measures(a)['accuracy/top1'] == 7
    assert f'{a}/20260101_000000/vis_data/scalars.json: left out what is not a whole line' in capsys.readouterr().err
    (tmp_path / 'd2').mkdir()
    (tmp_path / 'd2/metrics.json').write_text(f'{{"bbox/AP": 4.0, "iteration": 9}}\n{cut}')
    assert logged_measures(str(tmp_path / 'd2')) == {'bbox/AP': 4.0}


def test_runs_of_different_lengths_are_said_to_be(tmp_path, capsys):
    a, b, unfinished = (mmengine_run(tmp_path / name, 1) for name in 'abc')
    assert compare(capsys, tmp_path / 'out', f'plain={a}', f'x={b}').err == ''
    log = tmp_path / 'c/20260101_000000/vis_data/scalars.json'
    log.write_text(log.read_text().replace('"step": 2', '"step": 1'))
    shown = compare(capsys, tmp_path / 'out', f'plain={a},{b}', f'x={unfinished}')
    assert f'the last evaluation was at step or epoch 2: {a}, {b}; 1: {unfinished}' in shown.err
    for name, step in (('d', 9), ('e', 19)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.json').write_text(
            f'{{"bbox/AP": 4.0, "loss_cls": 1.0, "step_size": 2.0, "iteration": {step}}}\n'
        )
    shown = compare(capsys, tmp_path / 'out', f'plain={tmp_path}/d', f'x={tmp_path}/e')
    assert f'epoch 9: {tmp_path}/d; 19: {tmp_path}/e' in shown.err
    assert 'iteration' not in shown.out
    assert 'step' not in shown.out


def test_every_message_names_the_file(tmp_path, capsys):
    a, b = (mmengine_run(tmp_path / name, 1) for name in 'ab')
    data = tmp_path / 'b/20260101_000000/vis_data'
    (tmp_path / 'file').write_text('')
    (tmp_path / 'empty').mkdir()
    assert f'{tmp_path}/empty: no evaluation' in refused(capsys, tmp_path / 'out', f'x={tmp_path}/empty')
    assert f'{tmp_path}/file' in refused(capsys, tmp_path / 'file', f'x={a}')  # where a folder is asked for
    assert '/proc/out' in refused(capsys, '/proc/out', f'x={a}')
    (data / 'config.py').write_text('model = dict(\n    backbone=dict(ty')
    assert f'{data}/config.py: is no config, or not a whole one' in refused(capsys, tmp_path / 'out', f'x={a},{b}')
    (data / 'scalars.json').write_text('no log')
    assert f'{data}/scalars.json: is no log' in refused(capsys, tmp_path / 'out', f'x={a},{b}')
    (data / 'scalars.json').write_bytes(b'\xff\xfe\x00')
    assert f'{data}/scalars.json: is not a text' in refused(capsys, tmp_path / 'out', f'x={a},{b}')


def test_a_measure_that_a_run_lacks_is_left_out_with_a_word(tmp_path, capsys):
    a, b = (mmengine_run(tmp_path / name, 1) for name in 'ab')
    log = tmp_path / 'b/20260101_000000/vis_data/scalars.json'
    log.write_text('{"accuracy/top1": 2.0, "calibration/ece": NaN, "step": 2}\n')
    shown = compare(capsys, tmp_path / 'out', f'plain={a}', f'x={b}')
    assert 'calibration/ece' not in shown.out
    assert 'left out, as not every run has a number for it: calibration/ece' in shown.err


def test_precision_is_known_by_the_names_that_detectors_log():
    names = [
        'coco/bbox_mAP',
        'coco/segm_mAP_50',
        'coco/bbox_mAP_s',
        'bbox/AP',
        'bbox/AP50',
        'bbox/APs',
        'bbox/AP-person',
    ]
    assert [name for name, column in columns_of(names).items() if column.better != 'higher'] == []
    assert columns_of(['map_size'])['map_size'].better is None
