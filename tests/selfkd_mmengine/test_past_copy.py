"""The past copy in the mode that the network trains in: noise of its own, which a resumed run draws again."""

import pytest
import torch
from helpers.mmengine import assert_same_state, by_iterations, digits_config, train
from mmengine.config import ConfigDict
from mmengine.hooks import Hook

SNAPSHOT = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8, teacher='snapshot')
DROPOUT = dict(type='StackedLinearClsHead', num_classes=10, in_channels=32, mid_channels=[16], dropout_rate=0.5)

LAST = 'head.layers.1.fc.weight'


class Seed(Hook):
    """Dropout draws the same in a resumed run: mmengine does not save the random state."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        torch.manual_seed(runner.iter)


def config(digits, folder, *hooks, **options):
    cfg = digits_config(digits, folder, *hooks, **options)
    cfg.model.head = ConfigDict(DROPOUT)
    cfg.default_hooks.checkpoint.max_keep_ckpts = -1
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    return cfg


@pytest.fixture(scope='module')
def vanilla(digits, tmp_path_factory):
    return train(config(digits, tmp_path_factory.mktemp('vanilla'))).model.state_dict()


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('alpha', [0.0, 1e-30])
def test_weight_zero_is_plain_training_with_dropout_in_the_model(digits, tmp_path, vanilla, mode, alpha):
    """Also with an alpha that is lost in rounding, with which the copy does run: it takes no random numbers away."""
    weights = train(config(digits, tmp_path, dict(SNAPSHOT, alpha=alpha, teacher_mode=mode))).model.state_dict()
    assert_same_state(weights, vanilla)


def test_the_modes_differ(digits, tmp_path, vanilla):
    runs = [train(config(digits, tmp_path / m, dict(SNAPSHOT, teacher_mode=m))).model for m in ('train', 'eval')]
    first, second = (model.state_dict()[LAST] for model in runs)
    assert (first - second).abs().max() > 1e-4
    assert all((weight - vanilla[LAST]).abs().max() > 1e-4 for weight in (first, second))


@pytest.mark.parametrize(('teacher', 'mode'), [('snapshot', 'train'), ('snapshot', 'eval'), ('ema', 'train')])
@pytest.mark.parametrize('loop', ['epochs', 'iterations'])
def test_resuming_is_exact(digits, tmp_path, loop, teacher, mode):
    """After an epoch; and between two refreshes of the copy (4 iterations apart), or at one. The backbone keeps its
    norms in evaluation mode, which the loop sees to after the copy was made."""

    def made(folder, **options):
        hook = dict(SNAPSHOT, teacher=teacher, teacher_mode=mode, **({} if loop == 'epochs' else {'interval': 4}))
        options['model.backbone.norm_eval'] = True
        cfg = config(digits, tmp_path / folder, hook, **options)
        return cfg if loop == 'epochs' else by_iterations(cfg, 14, interval=2)

    straight = train(made('straight'), Seed())
    for name in ('epoch_2',) if loop == 'epochs' else ('iter_6', 'iter_8', 'iter_10'):
        checkpoint = tmp_path / f'straight/{name}.pth'
        resumed = train(made(name, resume=True, load_from=str(checkpoint)), Seed())
        assert_same_state(resumed.model.state_dict(), straight.model.state_dict())
        assert_same_state(resumed.optim_wrapper.state_dict(), straight.optim_wrapper.state_dict())
