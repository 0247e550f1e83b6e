"""Trainers and hooks as projects write them: the methods act in their training steps, there only, or are refused."""

import logging

import helpers.detectron2 as d2_runs
import pytest
import torch
from detectron2.engine import DefaultTrainer, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from helpers.detectron2 import CSKD, FRSKD, PSKD, Reseed, batches, config, scalars, train

from selfkd_detectron2 import selfkd_hooks, with_self_teacher

ALL = PSKD + CSKD + FRSKD
FROZEN = 'SOLVER.BASE_LR 0.0 '


def logged(out):
    """What was logged of the methods and of the losses, in each step."""
    steps = scalars(out)
    return [{k: v for k, v in steps[i].items() if 'loss' in k or 'pskd' in k} for i in sorted(steps)]


@pytest.mark.parametrize('model', ['faster', 'cascade', 'retinanet'])
def test_a_validation_loss_is_the_plain_one_and_leaves_the_logs_alone(voc, tmp_path, model):
    """Computed ahead of the methods' hooks or behind them, with gradients or without."""
    options = FROZEN + (PSKD if model == 'retinanet' else ALL)
    plain, behind = d2_runs.ValidationLoss(gradients=False), d2_runs.ValidationLoss(gradients=False)
    train(config(voc, tmp_path / 'plain', model, FROZEN), plain, Reseed())
    train(config(voc, tmp_path / 'without', model, options), Reseed())
    cfg = config(voc, tmp_path / 'with', model, options)
    ahead = train(cfg, behind, Reseed(), kind=d2_runs.ValidatingTrainer).validation
    assert len(plain.losses) == 6
    for losses in (ahead.losses, behind.losses):
        assert [set(step) for step in losses] == [set(step) for step in plain.losses]
        for step, expected in zip(losses, plain.losses):
            assert step == pytest.approx(expected, rel=1e-5)
    assert logged(tmp_path / 'with') == logged(tmp_path / 'without')


def test_a_validation_loss_within_the_step_is_the_plain_one(voc, tmp_path):
    """A trainer's own run_step may compute it, without gradients."""
    seen = []

    class Trainer(d2_runs.Trainer):
        def run_step(self):
            torch.manual_seed(0)
            with torch.no_grad():
                seen.append({name: float(loss) for name, loss in self.model(batches(self.cfg)[1][:1]).items()})
            super().run_step()

    for options in ('', ALL):
        train(config(voc, tmp_path / options[:6], options=FROZEN + options), kind=Trainer)
    assert seen[6:] == [pytest.approx(losses, rel=1e-5) for losses in seen[:6]]
    assert scalars(tmp_path / ALL[:6])[5]['pskd_soft'] > 0


def test_an_init_of_its_own_loses_no_method(voc, tmp_path):
    train(config(voc, tmp_path / 'own', options=ALL), Reseed(), kind=d2_runs.OwnTrainer)
    train(config(voc, tmp_path / 'ours', options=ALL), Reseed())
    assert logged(tmp_path / 'own') == logged(tmp_path / 'ours')
    assert {'pskd_soft', 'loss_cskd', 'loss_teacher'} <= set(logged(tmp_path / 'own')[-1])


def test_an_init_of_its_own_resumes_the_past_copy(voc, tmp_path):
    cfg = config(voc, tmp_path, options=PSKD + 'SOLVER.CHECKPOINT_PERIOD 4')
    train(cfg, Reseed(), kind=d2_runs.OwnTrainer)
    straight = torch.load(tmp_path / 'model_final.pth')['model']
    assert 'PSKDHook' in torch.load(tmp_path / 'model_0000003.pth')['trainer']['hooks']
    (tmp_path / 'last_checkpoint').write_text('model_0000003.pth')
    train(cfg, Reseed(), kind=d2_runs.OwnTrainer, resume=True)
    resumed = torch.load(tmp_path / 'model_final.pth')['model']
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


class LeftTrainer(DefaultTrainer):
    """A script whose trainer was left as it was."""

    @classmethod
    def build_train_loader(cls, cfg):
        return d2_runs.Cycle(batches(cfg))


@pytest.mark.parametrize(('options', 'hook'), [(PSKD, 'PSKDHook'), (CSKD, 'CSKDHook'), (FRSKD, 'FRSKDHook')])
def test_a_trainer_that_reads_none_of_the_settings_is_refused(voc, tmp_path, options, hook):
    message = f'{options.split()[0]} is True, but LeftTrainer has not registered {hook}.*Derive it from .*SelfKDTrainer'
    with pytest.raises(ValueError, match=message):
        train(config(voc, tmp_path, options=options), kind=LeftTrainer)


def test_a_trainer_that_registers_the_hooks_by_hand_is_not(voc, tmp_path):
    cfg = config(voc, tmp_path, options=PSKD + CSKD)
    train(cfg, *selfkd_hooks(cfg), kind=LeftTrainer)
    assert scalars(tmp_path)[5]['pskd_soft'] > 0
    train(config(voc, tmp_path / 'off'), kind=LeftTrainer)


@pytest.mark.parametrize(('options', 'says'), [('', True), (CSKD, False), (FRSKD, False)])
def test_a_trainer_without_a_config_says_that_nothing_is_at_work(voc, tmp_path, caplog, options, says):
    """As Detectron2's own script for a LazyConfig, which does not read ``train.selfkd``."""
    cfg = config(voc, tmp_path, options=options)
    model = build_model(with_self_teacher(cfg))
    trainer = SimpleTrainer(model, d2_runs.Cycle(batches(cfg)), build_optimizer(cfg, model))
    trainer.register_hooks(selfkd_hooks(cfg) if options == CSKD else [])
    logging.getLogger('detectron2.selfkd').addHandler(caplog.handler)
    trainer.train(0, 1)
    assert ('none of its hooks: it trains plainly' in caplog.text) == says
