"""Which teacher a run takes and says that it takes, and what a moving average is the average of."""

import pytest
import torch
from helpers.mmengine import digits_config, find_hook, train
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmpretrain.registry import DATASETS

PSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)
MIXUP = {'data_preprocessor.batch_augments': dict(augments=[dict(type='Mixup', alpha=1.0)])}
PACK = [dict(type='LoadImageFromFile'), dict(type='PackInputs', meta_keys=('img_path',))]


@DATASETS.register_module(force=True)
class Unnumbered(torch.utils.data.Dataset):
    """Hands on what another data set gives; it could mix samples, too."""

    def __init__(self, dataset):
        self.dataset = DATASETS.build(dataset)
        self.metainfo = self.dataset.metainfo

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


def log_of(folder):
    return ' '.join(' '.join(path.read_text() for path in folder.rglob('*.log')).split())


def config(digits, folder, hook, **options):
    return digits_config(digits, folder, hook, log_level='INFO', **{'train_cfg.max_epochs': 2, **options})


@pytest.mark.parametrize(
    ('case', 'taken', 'reason'),
    [
        ('plain', 'bank', 'each sample keeps its identity'),
        ('mixup', 'snapshot', 'batch augmentations (Mixup, CutMix, ...) mix samples'),
        ('dataset', 'snapshot', 'Unnumbered gives its samples no index'),
        ('meta_keys', 'snapshot', "PackInputs in the training pipeline leaves out 'sample_idx'"),
        ('classes', 'snapshot', 'neither the head ClsHead nor the training set says how many classes there are'),
    ],
)
def test_auto_takes_the_bank_where_samples_keep_their_identity(digits, tmp_path, case, taken, reason):
    cfg = config(digits, tmp_path, PSKD, **(MIXUP if case == 'mixup' else {}))
    dataset = cfg.train_dataloader.dataset
    if case == 'dataset':
        cfg.train_dataloader.dataset = ConfigDict(type='Unnumbered', dataset=dict(dataset, _scope_='mmpretrain'))
    if case == 'meta_keys':
        dataset.pipeline = PACK
    if case == 'classes':
        linear = dict(type='LinearNeck', in_channels=32, out_channels=10, norm_cfg=None)
        cfg.model.neck, cfg.model.head = [cfg.model.neck, linear], ConfigDict(type='ClsHead')
        cfg.train_dataloader.dataset = ConfigDict(type='Nameless', **{k: v for k, v in dataset.items() if k != 'type'})
    runner = train(cfg)
    hook = find_hook(runner, 'PSKDHook')
    assert hook.source == taken
    assert f"PS-KD: teacher='auto' takes the {taken}: {reason}" in log_of(tmp_path)
    assert runner.message_hub.log_scalars['train/pskd_soft'].data[0][-1] > 0


@DATASETS.register_module(force=True)
class Nameless(DATASETS.get('CustomDataset')):
    """Does not say which classes there are."""

    @property
    def metainfo(self):
        return {}


def test_what_is_set_for_the_other_teacher_is_said(digits, tmp_path):
    train(config(digits, tmp_path / 'snapshot', dict(PSKD, top_k=3, teacher_mode='eval'), **MIXUP))
    assert "PSKDHook: top_k: no effect with teacher='snapshot', which was taken" in log_of(tmp_path / 'snapshot')
    train(config(digits, tmp_path / 'bank', dict(PSKD, top_k=3, teacher_mode='eval')))
    assert "PSKDHook: teacher_mode: no effect with teacher='bank', which was taken" in log_of(tmp_path / 'bank')


@pytest.mark.parametrize(('saved', 'resumed'), [('bank', 'snapshot'), ('ema', 'bank'), ('snapshot', 'bank')])
def test_another_teachers_past_is_refused(digits, tmp_path, saved, resumed):
    train(config(digits, tmp_path, dict(PSKD, teacher=saved)))
    cfg = config(digits, tmp_path, dict(PSKD, teacher=resumed), resume=True, **{'train_cfg.max_epochs': 3})
    with pytest.raises(ValueError, match=f"is of teacher='{saved}', and this run of '{resumed}': resume"):
        train(cfg)


def test_a_resumed_run_has_the_teacher_that_auto_took(digits, tmp_path):
    train(config(digits, tmp_path, PSKD, **MIXUP))
    cfg = config(
        digits, tmp_path, PSKD, resume=True, **{'train_cfg.max_epochs': 3}
    )  # without Mixup it would be the bank
    assert find_hook(train(cfg), 'PSKDHook').source == 'snapshot'


class Weights(Hook):
    """The classifier's weight before each iteration."""

    priority = 'LOWEST'

    def __init__(self):
        self.weights = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.weights.append(runner.model.head.fc.weight.detach().clone())


@pytest.mark.parametrize('accumulated', [1, 2])
def test_the_average_moves_with_each_step_of_the_optimizer(digits, tmp_path, accumulated):
    hook = dict(PSKD, teacher='ema', ema_decay=0.2)
    runner = train(
        config(digits, tmp_path, hook, **{'optim_wrapper.accumulative_counts': accumulated}), seen := Weights()
    )
    average, updates = seen.weights[0], 0
    for before, after in zip(seen.weights, seen.weights[1:]):
        if (before != after).any():
            updates += 1
            decay = min(0.2, (1 + updates) / (10 + updates))
            average = decay * average + (1 - decay) * after
    past = find_hook(runner, 'PSKDHook').past
    assert past.updates == updates == (len(seen.weights) - 1) // accumulated
    torch.testing.assert_close(past.model.head.fc.weight, average)
    soft = runner.message_hub.log_scalars['train/pskd_soft'].data[0]
    assert (soft[:5] == 0).all()  # an epoch has no past, whatever its source
    assert (soft[5:] > 0).all()
