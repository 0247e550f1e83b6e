"""torch 2.6 and later load what mmengine's own checkpoints hold, and refuse everything else."""

import functools
import pickle
import zipfile

import numpy as np
import pytest
import torch
from helpers.mmengine import assert_same_state, digits_config, train
from mmengine.logging import HistoryBuffer
from mmengine.runner import load_checkpoint

from selfkd_mmengine import allow_mmengine_checkpoints

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


class Regression(torch.nn.Linear):
    """The smallest model that transformers' Trainer trains."""

    def forward(self, x, labels):
        out = super().forward(x)
        return dict(loss=(out - labels).square().mean(), logits=out)


def test_after_a_resumed_training_of_transformers(run, tmp_path):
    """Its Trainer allows numpy's arrays while it loads the state of the random numbers, and then forbids them."""
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    pytest.importorskip('accelerate', reason='accelerate is not installed')
    trained, folder = run
    for resume in (False, True):
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=3 if resume else 2, save_steps=1, report_to='none', use_cpu=True, disable_tqdm=True
        )
        samples = [dict(x=torch.ones(2), labels=torch.ones(1))] * 8
        trainer = transformers.Trainer(Regression(2, 1), args, train_dataset=samples)
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 3
    assert np.ndarray not in torch.serialization.get_safe_globals()  # what the Trainer did
    if torch.__version__ < (2, 7):
        allow_mmengine_checkpoints()
    load_checkpoint(trained.model, str(folder / 'epoch_3.pth'))


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
