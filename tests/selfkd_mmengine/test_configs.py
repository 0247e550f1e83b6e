"""Configs of ours by name, and configs that inherit from them."""

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from conftest import ROOT
from selfkd_mmengine.configs import PACKAGES, config_path, load_config

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


def test_mmengine_itself_knows_a_fixed_list_of_packages(tmp_path, monkeypatch):
    """Why `mim train` and the toolkits' own scripts take no ``selfkd_...::`` in ``_base_``, as the pages say."""
    monkeypatch.delitem(MODULE2PACKAGE, 'selfkd_mmpretrain', raising=False)
    (tmp_path / 'mine.py').write_text("_base_ = ['selfkd_mmpretrain::_base_/pskd.py']")
    with pytest.raises(AssertionError, match='does not support to load selfkd_mmpretrain config'):
        Config.fromfile(tmp_path / 'mine.py')
