"""Configs of ours by name, and configs that inherit from them."""

import re
from pathlib import Path

import mmpretrain
import pytest
from helpers import ROOT
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from selfkd.cli import main
from selfkd_mmengine.configs import PACKAGES, config_path, load_config, refuse_lost_hooks

EXAMPLES = {
    'selfkd_mmpretrain': 'frskd/resnet18_1xb32-200e_cub200_frskd.py',
    'selfkd_mmdet': 'pskd/faster-rcnn_r18_fpn_digits.py',
    'selfkd_mmseg': 'frskd/pspnet_r50-d8_4xb4-20k_voc12aug-512x512_frskd.py',  # inherits from mmseg::
}


def own(package):
    return Config.fromfile(ROOT / 'configs' / package.replace('selfkd_', '') / EXAMPLES[package])


@pytest.mark.parametrize('package', PACKAGES)
def test_a_config_of_ours_is_the_same_by_name_and_inherited(tmp_path, package):
    """Word for word: mmengine would note ``_scope_='selfkd_...'``, where no toolkit's types are found."""
    pytest.importorskip(package.replace('selfkd_', ''), reason='that toolkit is not installed')
    name = f'{package}::{EXAMPLES[package]}'
    assert load_config(name).to_dict() == own(package).to_dict()
    (tmp_path / 'mine.py').write_text(f'_base_ = [{name!r}]\nlist_of_pairs = [({{"type": "A"}}, 1)]')
    inherited = load_config(str(tmp_path / 'mine.py')).to_dict()
    assert inherited.pop('list_of_pairs') == [({'type': 'A'}, 1)]
    assert inherited == own(package).to_dict()


def test_a_variable_of_an_inherited_config_keeps_no_scope(tmp_path):
    (tmp_path / 'mine.py').write_text(
        "_base_ = ['selfkd_mmpretrain::_base_/digits.py']\nmodels = [(_base_.model, _base_.train_pipeline)]"
    )
    assert '_scope_' not in load_config(str(tmp_path / 'mine.py')).pretty_text


def test_scopes_of_toolkits_stay(tmp_path):
    (tmp_path / 'mine.py').write_text("_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py']")
    assert load_config(str(tmp_path / 'mine.py')).model['_scope_'] == 'mmpretrain'


def test_what_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match='selfkd_mmdet::pskd/none.py: no such config, `selfkd config` lists'):
        load_config('selfkd_mmdet::pskd/none.py')
    (tmp_path / 'mine.py').write_text("_base_ = ['selfkd_mmdet::pskd/none.py']")
    with pytest.raises(FileNotFoundError, match='pskd/none.py'):
        load_config(str(tmp_path / 'mine.py'))
    assert config_path('configs/mine.py') == 'configs/mine.py'


ZOO = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'


def test_a_config_of_a_toolkit_by_name(capsys):
    cfg, own = load_config(ZOO), Path(mmpretrain.__file__).parent / '.mim/configs/resnet/resnet18_8xb32_in1k.py'
    assert cfg.to_dict() == Config.fromfile(own).to_dict()
    main(['config', ZOO])
    assert capsys.readouterr().out == f'{own}\n'


@pytest.mark.parametrize('command', ['config', 'train'])
@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('mmpretrain::nonsense.py', 'mmpretrain::nonsense.py: no such config, look in .*mmpretrain/.mim/configs'),
        ('mmpretrain::resnet/none.py', 'mmpretrain::resnet/none.py: no such config'),
        ('selfkd_mmseg::none.py', 'selfkd_mmseg::none.py: no such config, `selfkd config` lists'),
        ('nonsense::resnet/none.py', 'nonsense::resnet/none.py: there is no package nonsense here'),
        ('not a name::x.py', 'there is no package not a name here'),
        ('nonsense.py', 'nonsense.py'),
    ],
)
def test_a_name_that_is_not_there_ends_the_command_with_a_message(command, name, message, capsys):
    with pytest.raises(SystemExit, match='2'):
        main([command, name])
    shown = capsys.readouterr()
    assert re.search(f'selfkd {command}: error: .*{message}', shown.err)
    assert not shown.out


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('model = dict(\n    backbone=dict(ty', 'mine.py: is no config, or not a whole one'),
        ("_base_ = ['selfkd_mmpretrain::_base_/none.py']", '_base_/none.py'),
        (
            "_base_ = ['selfkd_mmpretrain::_base_/pskd.py', 'selfkd_mmpretrain::_base_/cskd.py']",
            r'mine.py: two of its _base_ set the same key.*custom_hooks.* write default_hooks = dict\(NAME=dict',
        ),
        ("_base_ = ['selfkd_mmpretrain::_base_/digits.py', 'selfkd_mmpretrain::_base_/mnist.py']", 'set the same key'),
    ],
)
def test_a_config_that_cannot_be_read_ends_the_command_with_a_message(tmp_path, text, message, capsys):
    (tmp_path / 'mine.py').write_text(text)
    with pytest.raises(SystemExit, match='2'):
        main(['train', str(tmp_path / 'mine.py')])
    assert re.search(f'selfkd train: error: .*{message}', capsys.readouterr().err)


OLD = "_base_ = ['{base}']\n{line}\n"
NEW = 'from mmengine.config import read_base\nfrom selfkd_mmpretrain import PSKDHook\n'
NEW += 'with read_base():\n    from .{base} import *\n{line}\n'


@pytest.mark.parametrize('style', ['old', 'new'])
def test_a_list_of_hooks_that_drops_the_inherited_ones_is_refused(tmp_path, style, capsys):
    """The base has an EMAHook, as ConvNeXt of the zoo; the child's list takes its place, default_hooks adds to it."""
    ema = "custom_hooks = [dict(type='EMAHook', momentum=4e-5, priority='ABOVE_NORMAL')]\n"
    base = (ROOT / 'configs/mmpretrain/_base_/digits.py').read_text() + ema
    kind = "'selfkd_mmpretrain.PSKDHook'" if style == 'old' else 'PSKDHook'

    def write(name, line, below='base'):
        text = OLD if style == 'old' else NEW
        path = tmp_path / f'{name}.py'
        path.write_text(text.format(base=f'{below}.py' if style == 'old' else below, line=line))
        return str(path)

    (tmp_path / 'base.py').write_text(base)
    lost = write('lost', f'custom_hooks = [dict(type={kind}, alpha=0.8)]')
    message = (
        r'custom_hooks takes the place of the list in .*base.py, so training would be without EMAHook: write default'
    )
    for config in (lost, write('grandchild', 'train_cfg = dict(max_epochs=2)', 'lost')):
        with pytest.raises(ValueError, match=message):
            refuse_lost_hooks(config)
        for command in ('train', 'doctor'):
            with pytest.raises(SystemExit, match='2'):
                main([command, config])
            assert 'training would be without EMAHook' in capsys.readouterr().err

    both = f"custom_hooks = [dict(type='EMAHook'), dict(type={kind}, alpha=0.8)]"
    added = f'pskd=dict(type={kind}, alpha=0.8)'
    added = f'default_hooks = dict({added})' if style == 'old' else f'default_hooks.update({added})'
    for name, line in (
        ('both', both),
        ('added', added),
        ('own', 'custom_hooks = []'),
        ('on_purpose', f'custom_hooks = []\n{added}'),
    ):
        refuse_lost_hooks(write(name, line))
    cfg = load_config(str(tmp_path / 'added.py'))
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook']
    assert {'logger', 'checkpoint', 'sampler_seed', 'pskd'} == set(cfg.default_hooks)
    assert cfg.default_hooks.pskd.alpha == 0.8


@pytest.mark.parametrize('file', sorted((ROOT / 'configs/mmpretrain').glob('*/*.py')), ids=lambda file: file.stem)
def test_no_config_of_ours_drops_inherited_hooks(file):
    refuse_lost_hooks(str(file))


def test_mmengine_itself_knows_a_fixed_list_of_packages(tmp_path, monkeypatch):
    """Why `mim train` and the toolkits' own scripts take no ``selfkd_...::`` in ``_base_``, as the pages say."""
    monkeypatch.delitem(MODULE2PACKAGE, 'selfkd_mmpretrain', raising=False)
    (tmp_path / 'mine.py').write_text("_base_ = ['selfkd_mmpretrain::_base_/pskd.py']")
    with pytest.raises(AssertionError, match='does not support to load selfkd_mmpretrain config'):
        Config.fromfile(tmp_path / 'mine.py')


def test_a_save_that_fails_leaves_a_checkpoint():
    """mmengine deletes the old one before it writes the new one."""
    for path in (ROOT / 'configs').rglob('_base_/**/*.py'):
        hooks = Config.fromfile(path).get('default_hooks', {})
        if 'checkpoint' in hooks:
            assert hooks['checkpoint'].get('max_keep_ckpts', -1) != 1, path
