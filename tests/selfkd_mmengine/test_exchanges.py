"""What a hook or a user exchanges in the middle of a run is looked at again: pipelines, augmentations, losses, data."""

import pytest
from helpers.mmengine import Recorder, digits_config, find_hook, train
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmpretrain.models.losses import LabelSmoothLoss

PSKD, CSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8), dict(type='selfkd_mmpretrain.CSKDHook')
SNAPSHOT = dict(PSKD, teacher='snapshot')
PACK = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
MIXUP = dict(augments=[dict(type='Mixup', alpha=1.0)])
SMOOTH = dict(type='LabelSmoothLoss', label_smooth_val=0.1, num_classes=10)
SOFT = {'model.head.loss': dict(type='CrossEntropyLoss', use_soft=True), 'data_preprocessor.to_onehot': True}


def switched(digits, folder, *hooks, switch, **options):
    """A run whose third epoch has other settings (as EfficientNetV2's and MobileOne's have)."""
    switch = dict(type='SwitchRecipeHook', schedule=[dict(action_epoch=3, **switch)])
    return digits_config(digits, folder, *hooks, switch, **options)


class Rows(Hook):
    """The images of each row of the bank."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.images = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        rows = find_hook(runner, 'PSKDHook').past.rows.tolist()
        for row, sample in zip(rows, data_batch['data_samples']):
            self.images.setdefault(row, set()).add(sample.img_path)


@pytest.mark.parametrize('loader', [{}, dict(num_workers=1), dict(num_workers=1, persistent_workers=True)])
def test_an_exchanged_pipeline_keeps_the_rows_of_a_concatenated_set(digits, tmp_path, loader):
    cfg = switched(digits, tmp_path, PSKD, switch=dict(train_pipeline=PACK))
    part = dict(type='CustomDataset', data_root=str(digits), data_prefix='train', pipeline=PACK)
    parts = [dict(part, indices=20), dict(part, data_prefix='test', indices=20)]
    cfg.train_dataloader.dataset = ConfigDict(type='ConcatDataset', datasets=parts)
    cfg.train_dataloader.update(loader)
    train(cfg, rows := Rows())
    assert sorted(rows.images) == list(range(40))
    assert all(len(images) == 1 for images in rows.images.values())


@pytest.mark.parametrize(('hook', 'options'), [(PSKD, SOFT), (dict(type='selfkd_mmpretrain.TFKDHook'), {})])
def test_mixing_that_is_switched_on_is_refused_as_at_the_start(digits, tmp_path, hook, options):
    cfg = switched(digits, tmp_path, hook, switch=dict(batch_augments=MIXUP), **options)
    recorder = Recorder()
    with pytest.raises(ValueError, match='remove batch_augments'):
        train(cfg, recorder)
    assert len([step for step in recorder.steps if 'epoch' in step]) == 10  # the first two epochs


def test_a_snapshot_and_pairs_go_on_beside_mixing_that_is_switched_on(digits, tmp_path):
    train(switched(digits, tmp_path, SNAPSHOT, CSKD, switch=dict(batch_augments=MIXUP), **SOFT), recorder := Recorder())
    assert all(step['pskd_soft'] > 0 for step in recorder.steps[5:])
    assert all(step['loss_cskd'] > 0 for step in recorder.steps)
    assert (recorder.steps[-1]['label'] % 1 > 0).any()


@pytest.mark.parametrize('hooks', [[PSKD], [CSKD], [PSKD, CSKD]])
def test_hooks_follow_an_exchanged_loss(digits, tmp_path, hooks):
    """In either order of the hooks: what is exchanged before an epoch acts in its first iteration."""
    for i, order in enumerate([1, -1]):
        cfg = switched(digits, tmp_path / str(i), *hooks, switch=dict(loss=SMOOTH))
        cfg.custom_hooks = cfg.custom_hooks[::order]
        log = train(cfg).message_hub.log_scalars
        if PSKD in hooks:
            hard, soft = (log[f'train/pskd_{part}'].data[0] for part in ('hard', 'soft'))
            loss = log['train/loss'].data[0]
            assert len(loss) == 15
            assert (soft[5:] > 0).all()
            assert abs(hard + soft - loss).max() < 1e-4
        if CSKD in hooks:
            assert (log['train/loss_cskd'].data[0] > 0).all()


def test_an_exchanged_loss_that_cannot_work_is_refused(digits, tmp_path):
    cfg = switched(digits, tmp_path, PSKD, switch=dict(loss=dict(type='FocalLoss')))
    with pytest.raises(ValueError, match='trains with FocalLoss, which is not the cross-entropy'):
        train(cfg)


@pytest.mark.parametrize('hooks', [[], [PSKD, CSKD]])
def test_the_self_teacher_follows_an_exchanged_loss(digits, tmp_path, hooks):
    cfg = switched(digits, tmp_path, *hooks, switch=dict(loss=SMOOTH))
    cfg.model.type = 'selfkd_mmpretrain.FRSKDImageClassifier'
    model = train(cfg).model
    assert isinstance(model.head.loss_module, LabelSmoothLoss)
    assert model.self_teacher.loss_module is model.head.loss_module
    assert not [name for name in model.state_dict() if 'loss_module' in name]


class Exchange(Hook):
    """Gives the second epoch other data."""

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            cfg = runner.cfg.train_dataloader.copy()
            cfg.dataset.data_prefix = 'test'
            runner.train_loop.dataloader = runner.build_dataloader(cfg, seed=0)


def test_an_exchanged_training_set_is_refused(digits, tmp_path):
    with pytest.raises(ValueError, match='the training set was exchanged in the middle of the run'):
        train(digits_config(digits, tmp_path, PSKD), Exchange())
