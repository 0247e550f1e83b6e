"""A hook acts on the loss of a training iteration, and on no other that the model computes."""

import pytest
import torch
from mm_runs import Recorder, assert_same_state, digits_config, find_hook, train
from mmengine.hooks import Hook

PSKD, CSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8), dict(type='selfkd_mmpretrain.CSKDHook')
SNAPSHOT = dict(PSKD, teacher='snapshot')


class Validates(Hook):
    """Computes the loss of a batch of another size within each training iteration, before or after the training step,
    before the other hooks or behind them, with ``mode`` by its name or its place."""

    def __init__(self, when, priority, by_place, gradients=False):
        self.priority, self.by_place, self.gradients = priority, by_place, gradients
        setattr(self, f'{when}_train_iter', self.look)

    def before_train(self, runner):
        dataset = runner.train_dataloader.dataset
        data = runner.train_dataloader.collate_fn([dataset[i] for i in range(3)])
        self.data = runner.model.data_preprocessor(data, False)

    def look(self, runner, batch_idx, data_batch=None, outputs=None):
        states = {name: value.clone() for name, value in runner.model.state_dict().items()}
        with torch.set_grad_enabled(self.gradients):
            if self.by_place:
                losses = runner.model(self.data['inputs'], self.data['data_samples'], 'loss')
            else:
                losses = runner.model(**self.data, mode='loss')
        assert set(losses) == {'loss'}
        own = runner.model.head.loss_module
        logits = []
        tap = own.register_forward_pre_hook(lambda module, args: logits.append(args[0]))
        runner.model.load_state_dict(states)  # batch norms keep account of what they see
        with torch.no_grad():
            runner.model(**self.data, mode='loss')
        tap.remove()
        runner.model.load_state_dict(states)
        label = torch.cat([sample.gt_label for sample in self.data['data_samples']])
        assert losses['loss'].item() == pytest.approx(own.forward(logits[0], label).item(), rel=1e-4)


@pytest.mark.parametrize('hook', [PSKD, SNAPSHOT, CSKD])
@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize(('priority', 'by_place'), [('VERY_HIGH', False), ('VERY_LOW', True)])
def test_a_loss_beside_the_training_step_is_plain_and_leaves_no_trace(digits, tmp_path, hook, when, priority, by_place):
    plain = train(digits_config(digits, tmp_path / 'without', hook), without := Recorder())
    looked = train(digits_config(digits, tmp_path / 'with', hook), Validates(when, priority, by_place))
    assert_same_state(looked.model.state_dict(), plain.model.state_dict())
    losses = looked.message_hub.log_scalars['train/loss'].data[0]
    assert losses.tolist() == [step['loss'] for step in without.steps]
    if hook is PSKD:
        banks = [find_hook(runner, 'PSKDHook').bank.state_dict() for runner in (plain, looked)]
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
