"""torch 2.6 and later load what mmengine's own checkpoints hold, and refuse everything else."""

import functools
import pickle
import zipfile

import numpy as np
import pytest
import torch
from mm_runs import assert_same_state, digits_config, train
from mmengine.logging import HistoryBuffer
from mmengine.runner import load_checkpoint

pytestmark = pytest.mark.skipif(
    not hasattr(torch.serialization, 'add_safe_globals'), reason='this torch loads every object'
)
PSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)


@pytest.fixture(scope='module')
def run(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    cfg = digits_config(digits, folder, PSKD)
    cfg.train_cfg.val_interval = 1  # validation leaves numbers of numpy in the log
    cfg.default_hooks.checkpoint.update(max_keep_ckpts=3, save_best='auto')
    return train(cfg), folder


def test_resuming_is_exact(digits, tmp_path, run):
    straight, folder = run
    cfg = digits_config(digits, tmp_path, PSKD, resume=True, load_from=str(folder / 'epoch_2.pth'))
    cfg.train_cfg.val_interval = 1
    resumed = train(cfg)
    assert_same_state(resumed.model.state_dict(), straight.model.state_dict())
    assert_same_state(resumed.optim_wrapper.state_dict(), straight.optim_wrapper.state_dict())


def test_load_from(digits, tmp_path, run):
    straight, folder = run
    cfg = digits_config(digits, tmp_path, PSKD, load_from=str(folder / 'epoch_3.pth'))
    cfg.optim_wrapper.optimizer.lr = 0.0
    weights = train(cfg).model.state_dict()
    for name, _ in straight.model.named_parameters():
        assert torch.equal(weights[name], straight.model.state_dict()[name])


@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_a_file_written_beside_another_numpy(run, tmp_path, module):
    straight, folder = run
    with zipfile.ZipFile(folder / 'epoch_3.pth') as old, zipfile.ZipFile(tmp_path / 'other.pth', 'w') as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith('data.pkl'):
                for other in (b'numpy._core.multiarray', b'numpy.core.multiarray'):
                    content = content.replace(b'c' + other + b'\n', b'c' + module.encode() + b'\n')
                assert module.encode() in content
            new.writestr(name, content)
    loaded = torch.load(tmp_path / 'other.pth', weights_only=True)
    assert_same_state(loaded['state_dict'], straight.model.state_dict())


class Reduces:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


FOREIGN = {
    'an object': functools.partial(print, 1),
    'a call': Reduces(print, 'hello'),
    'an array of objects': np.array([print, None], dtype=object),
    'another attribute': Reduces(getattr, HistoryBuffer, 'register_statistics'),
    'an attribute of the attributes': Reduces(getattr, HistoryBuffer, '__init__'),
    'an attribute of something else': Reduces(getattr, np.ndarray, 'tofile'),
    'an attribute with a default': Reduces(getattr, HistoryBuffer, 'mean', print),
    'a statistic that is called': Reduces(HistoryBuffer.mean, HistoryBuffer([1.0], [1])),
}


@pytest.mark.parametrize('name', FOREIGN)
def test_anything_else_is_refused(run, tmp_path, name):
    trained, folder = run
    checkpoint = torch.load(folder / 'epoch_3.pth')
    checkpoint['meta']['foreign'] = FOREIGN[name]
    torch.save(checkpoint, tmp_path / 'foreign.pth')
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        load_checkpoint(trained.model, str(tmp_path / 'foreign.pth'))
