"""`selfkd doctor` on small configs: what works, what is refused, and what cannot run here."""

import pytest
from helpers.mmengine import digits_config
from mmengine.config import Config

from selfkd.cli import main
from selfkd_mmengine.doctor import shortened


def doctor(capsys, cfg, tmp_path, *arguments):
    """Method -> what was said of it."""
    cfg.dump(tmp_path / 'config.py')
    main(['doctor', str(tmp_path / 'config.py'), *arguments])
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split(': ', 1) for line in lines if not line.startswith('    ')), lines


def test_a_classifier_works_with_each_method(digits, tmp_path, capsys):
    cfg = digits_config(digits, tmp_path / 'run', dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.3))
    said, lines = doctor(capsys, cfg, tmp_path, '--batch-size', '4')
    assert said['plain'] == 'works'
    assert said['PS-KD'].startswith("works; teacher 'bank': each sample keeps its identity; a step takes ")
    assert all(said[method].startswith('works') for method in ('CS-KD', 'FRSKD'))
    assert '    --cfg-options model.type=selfkd_mmpretrain.FRSKDImageClassifier' in lines
    assert not (tmp_path / 'run').exists()  # it writes nothing


def test_the_teacher_and_the_refusals_have_their_reasons(digits, tmp_path, capsys):
    mixup = dict(augments=[dict(type='Mixup', alpha=0.2)])
    cfg = digits_config(digits, tmp_path / 'run', **{'model.train_cfg': mixup})
    cfg.model.head.topk = (1,)
    said, _ = doctor(capsys, cfg, tmp_path, '--batch-size', '4')
    assert "works; teacher 'snapshot': batch augmentations (Mixup" in said['PS-KD']
    assert said['CS-KD'].startswith('works')


def test_data_that_are_not_there_are_named(digits, tmp_path, capsys):
    cfg = digits_config(digits, tmp_path / 'run', **{'train_dataloader.dataset.data_root': str(tmp_path / 'none')})
    cfg.dump(tmp_path / 'config.py')
    with pytest.raises(SystemExit, match='plain training of .*config.py does not run here'):
        main(['doctor', str(tmp_path / 'config.py')])
    assert str(tmp_path / 'none') in capsys.readouterr().out


def test_other_configs_are_refused(tmp_path, capsys):
    (tmp_path / 'config.py').write_text("default_scope = 'mmpose'\n")
    with pytest.raises(SystemExit, match='2'):
        main(['doctor', str(tmp_path / 'config.py')])
    assert "default_scope is 'mmpose'" in capsys.readouterr().err


def test_a_shortened_config_leaves_the_given_one_and_keeps_the_users_hooks(digits, tmp_path):
    ours, ema = dict(type='selfkd_mmpretrain.CSKDHook'), dict(type='EMAHook')
    cfg = digits_config(digits, tmp_path, ours, ema)
    before = Config(cfg.to_dict())
    short = shortened(cfg, str(tmp_path), 2)
    assert cfg.to_dict() == before.to_dict()
    assert [hook.type for hook in short.custom_hooks] == ['EMAHook']
    assert (short.train_dataloader.batch_size, short.train_dataloader.num_batch_per_epoch) == (2, 2)
