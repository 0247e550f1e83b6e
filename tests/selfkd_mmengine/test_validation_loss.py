"""A hook acts on the loss of a training iteration, and on no other that the model computes."""

import pytest
import torch
from helpers.mmengine import assert_same_state, digits_config, find_hook, train
from mmengine.hooks import Hook

PSKD, CSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8), dict(type='selfkd_mmpretrain.CSKDHook')
SNAPSHOT = dict(PSKD, teacher='snapshot')


class Validates(Hook):
    """Computes the loss of a batch of another size within each training iteration, before or after the training step,
    before the other hooks or behind them, with ``mode`` by its name or its place."""

    def __init__(self, when, priority, by_place):
        self.priority, self.by_place = priority, by_place
        setattr(self, f'{when}_train_iter', self.look)

    def before_train(self, runner):
        dataset = runner.train_dataloader.dataset
        data = runner.train_dataloader.collate_fn([dataset[i] for i in range(3)])
        self.data = runner.model.data_preprocessor(data, False)

    @torch.no_grad()
    def look(self, runner, batch_idx, data_batch=None, outputs=None):
        states = {name: value.clone() for name, value in runner.model.state_dict().items()}
        own, calls = runner.model.head.loss_module, []
        tap = own.register_forward_pre_hook(lambda module, args: calls.append(args))
        if self.by_place:
            losses = runner.model(self.data['inputs'], self.data['data_samples'], 'loss')
        else:
            losses = runner.model(**self.data, mode='loss')
        tap.remove()
        runner.model.load_state_dict(states)  # batch norms keep account of what they see
        assert set(losses) == {'loss'}
        assert losses['loss'].item() == own.forward(*calls[0]).item()


@pytest.mark.parametrize('hook', [PSKD, SNAPSHOT, CSKD])
def test_a_loss_beside_the_training_step_is_plain_and_leaves_no_trace(digits, tmp_path, hook):
    options = {'train_cfg.max_epochs': 2}
    expected = train(digits_config(digits, tmp_path, hook, **options))
    places = [('before', 'VERY_HIGH', False), ('before', 'VERY_LOW', True), ('after', 'VERY_HIGH', True)]
    for when, priority, by_place in places:
        looked = train(digits_config(digits, tmp_path, hook, **options), Validates(when, priority, by_place))
        assert_same_state(looked.model.state_dict(), expected.model.state_dict())
        logs = [runner.message_hub.log_scalars['train/loss'].data[0].tolist() for runner in (looked, expected)]
        assert logs[0] == logs[1]
        if hook is PSKD:
            banks = [find_hook(runner, 'PSKDHook').past.bank.state_dict() for runner in (looked, expected)]
            assert_same_state(*banks)


def test_a_second_loss_with_gradients_in_an_iteration_is_refused(digits, tmp_path):
    class TwoPasses(Hook):
        def before_train(self, runner):
            model, step = runner.model, runner.model._run_forward
            model._run_forward = lambda data, mode: (step(data, mode), step(data, mode))[1]

    with pytest.raises(RuntimeError, match='PSKDHook: the model computed a second loss with gradients in one training'):
        train(digits_config(digits, tmp_path, PSKD), TwoPasses())


def test_a_model_that_gives_the_mode_by_its_place_is_tapped(digits, tmp_path):
    class ByPlace(Hook):
        def before_train(self, runner):
            model = runner.model
            model._run_forward = lambda data, mode: model(data['inputs'], data['data_samples'], mode)

    log = train(digits_config(digits, tmp_path, PSKD), ByPlace()).message_hub.log_scalars
    assert (log['train/pskd_soft'].data[0][5:] > 0).all()


def test_an_iteration_that_is_not_tapped_is_an_error_in_any_epoch(digits, tmp_path):
    class Later(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 1:
                model = runner.model
                model._run_forward = lambda data, mode: model.loss(data['inputs'], data['data_samples'])

    with pytest.raises(RuntimeError, match='could not be tapped'):
        train(digits_config(digits, tmp_path, PSKD), Later())
