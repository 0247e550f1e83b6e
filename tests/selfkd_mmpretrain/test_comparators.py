"""The comparators of the papers' tables in real MMPretrain training runs: TF-KD."""

import pytest
import torch
import torch.nn.functional as F
from mm_runs import Recorder, assert_same_state, digits_config, train

from selfkd.losses import tfkd_loss

TFKD = dict(type='selfkd_mmpretrain.TFKDHook', alpha=0.3, temperature=5.0, correct_prob=0.9)


def test_tfkd_loss_by_hand():
    """Two classes, u = (0.9, 0.1), T = 1: the teacher is softmax(u) = (e^0.8, 1) / (1 + e^0.8)."""
    z = torch.tensor([[0.0, 1.0]])
    teacher = torch.tensor([0.9, 0.1]).softmax(0)
    kl = (teacher * (teacher.log() - z[0].log_softmax(0))).sum()
    expected = 0.7 * F.cross_entropy(z, torch.tensor([0])) + 0.3 * kl
    got = tfkd_loss(z, torch.tensor([0]), alpha=0.3, temperature=1.0, correct_prob=0.9)
    torch.testing.assert_close(got, expected)


def test_tfkd_recomputed(digits, tmp_path):
    recorder = Recorder()
    train(digits_config(digits, tmp_path, TFKD, **{'train_cfg.max_epochs': 1}), recorder)
    for step in recorder.steps:
        u = torch.full((8, 10), 0.1 / 9).scatter_(1, step['label'][:, None], 0.9)
        p = (u / 5).softmax(1)
        kl = (p * (p.log() - step['logits'].log_softmax(1))).sum(1).mean()
        expected = 0.7 * F.cross_entropy(step['logits'], step['label']) + 0.3 * kl
        assert step['loss'] == pytest.approx(expected.item(), rel=1e-5)
        assert step['tfkd_kl'] == pytest.approx(0.3 * kl.item(), rel=1e-4)


def test_tfkd_alpha_0_trains_to_the_vanilla_weights(digits, tmp_path):
    vanilla = train(digits_config(digits, tmp_path / 'vanilla')).model.state_dict()
    assert_same_state(train(digits_config(digits, tmp_path / 'ours', dict(TFKD, alpha=0.0))).model.state_dict(), vanilla)


@pytest.mark.parametrize(
    ('hooks', 'options', 'message'),
    [
        ([dict(TFKD, alpha=1.5)], {}, r'alpha must lie in \[0, 1\], got 1.5'),
        ([dict(TFKD, correct_prob=0)], {}, 'correct_prob in'),
        ([TFKD, dict(type='selfkd_mmpretrain.PSKDHook')], {}, 'use one of the two hooks'),
        ([TFKD], {'data_preprocessor.batch_augments': dict(augments=dict(type='Mixup', alpha=0.2))}, 'remove batch_augments'),
    ],
)
def test_tfkd_refusals(digits, tmp_path, hooks, options, message):
    with pytest.raises(ValueError, match=message):
        train(digits_config(digits, tmp_path, *hooks, **options))
