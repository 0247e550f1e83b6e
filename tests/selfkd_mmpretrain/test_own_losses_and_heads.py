"""Losses and heads of users' own: what they compute decides, not what they are called or made from."""

import pytest
import torch
import torch.nn.functional as F
from helpers.mmengine import Recorder, digits_config, train
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.models.losses import CrossEntropyLoss, LabelSmoothLoss
from mmpretrain.registry import MODELS
from torch import nn

PSKD, CSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8), dict(type='selfkd_mmpretrain.CSKDHook')


class Focal(CrossEntropyLoss):
    """Inherits what makes it look like a cross-entropy."""

    def forward(self, cls_score, label, **kwargs):
        nll = F.cross_entropy(cls_score, label, reduction='none')
        return ((1 - (-nll).exp()) ** 2 * nll).mean()


class LogitAdjusted(CrossEntropyLoss):
    def forward(self, cls_score, label, **kwargs):
        prior = torch.linspace(1, 2, cls_score.shape[1]).softmax(0).log()
        return super().forward(cls_score + prior, label, **kwargs)


class Logging(CrossEntropyLoss):
    """The same value, with other names."""

    def forward(self, pred, target, weight=None, avg_factor=None, **kwargs):
        return super().forward(pred, target, weight=weight, avg_factor=avg_factor, **kwargs)


class Smoothed(LabelSmoothLoss):
    pass


class Own(nn.Module):
    """Made from nothing of MMPretrain's."""

    def forward(self, scores, labels, avg_factor=None):
        return F.cross_entropy(scores, labels, reduction='sum') / avg_factor


class OwnSmoothed(nn.Module):
    def forward(self, scores, labels, avg_factor=None):
        return F.cross_entropy(scores, labels, label_smoothing=0.2)


def config(digits, folder, hook, loss, **options):
    return digits_config(digits, folder, hook, **{'model.head.loss': dict(type=loss, **options)})


@pytest.mark.parametrize('loss', [Focal, LogitAdjusted, OwnSmoothed])
def test_a_loss_that_is_no_cross_entropy_is_refused_at_the_first_step(digits, tmp_path, loss):
    recorder = Recorder()
    with pytest.raises(RuntimeError, match=f'PSKDHook: {loss.__name__} gives .* where the cross-entropy of its logits'):
        train(config(digits, tmp_path, PSKD, loss), recorder)
    assert not [step for step in recorder.steps if 'epoch' in step]


@pytest.mark.parametrize(
    ('loss', 'options'),
    [
        (Logging, {}),
        (Logging, dict(loss_weight=2.0, class_weight=[0.5] * 5 + [2.0] * 5)),
        (Smoothed, dict(label_smooth_val=0.1)),
        (Own, {}),
    ],
)
def test_a_loss_that_is_one_trains(digits, tmp_path, loss, options):
    log = train(config(digits, tmp_path, PSKD, loss, **options)).message_hub.log_scalars
    hard, soft, total = (log[f'train/{name}'].data[0] for name in ('pskd_hard', 'pskd_soft', 'loss'))
    assert (soft[5:] > 0).all()
    assert abs(hard + soft - total).max() < 1e-4


def test_cskd_adds_to_whatever_softmax_loss_there_is(digits, tmp_path):
    log = train(config(digits, tmp_path, CSKD, Focal)).message_hub.log_scalars
    assert (log['train/loss_cskd'].data[0] > 0).all()


@MODELS.register_module()
class OwnPathHead(LinearClsHead):
    """Its loss does not call its forward, and sees what that gives."""

    def loss(self, feats, data_samples, **kwargs):
        return self._get_loss(self.fc(self.pre_logits(feats)), data_samples, **kwargs)


@MODELS.register_module()
class CopyingHead(LinearClsHead):
    """Its loss sees a copy of what its forward gives."""

    def loss(self, feats, data_samples, **kwargs):
        return self._get_loss(self(feats).clone(), data_samples, **kwargs)


@MODELS.register_module()
class OwnMarginHead(LinearClsHead):
    """Its loss does not call its forward, and sees the label's logit less ten."""

    def loss(self, feats, data_samples, **kwargs):
        label = torch.cat([sample.gt_label for sample in data_samples])
        scores = self.fc(self.pre_logits(feats))
        return self._get_loss(scores - 10 * F.one_hot(label, 10), data_samples, **kwargs)


@MODELS.register_module()
class InPlaceMarginHead(LinearClsHead):
    """Its loss changes in place what its forward gave."""

    def loss(self, feats, data_samples, **kwargs):
        label, scores = torch.cat([sample.gt_label for sample in data_samples]), self(feats)
        scores -= 10 * F.one_hot(label, 10)
        return self._get_loss(scores, data_samples, **kwargs)


HEADS = dict(OwnPathHead=True, CopyingHead=True, OwnMarginHead=False, InPlaceMarginHead=False)


@pytest.mark.parametrize('hook', [PSKD, dict(PSKD, teacher='snapshot'), CSKD])
@pytest.mark.parametrize('head', HEADS)
def test_a_head_must_train_on_what_it_predicts(digits, tmp_path, hook, head):
    cfg = digits_config(digits, tmp_path, hook, **{'model.head.type': head})
    if HEADS[head]:
        log = train(cfg).message_hub.log_scalars
        assert (log['train/loss_cskd' if hook is CSKD else 'train/pskd_soft'].data[0][5:] > 0).all()
    else:
        with pytest.raises(RuntimeError, match='is trained on other logits than those that the head predicts'):
            train(cfg)


@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'AmpOptimWrapper'])
def test_the_look_at_the_prediction_changes_nothing(digits, tmp_path, monkeypatch, wrapper):
    """Dropout draws what it would draw, batch norms keep account once, and weights that are cast have gradients."""
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    head = dict(type='StackedLinearClsHead', num_classes=10, in_channels=32, mid_channels=[16], dropout_rate=0.5)
    options = {'model.head': head, 'train_cfg.max_epochs': 2, 'optim_wrapper.type': wrapper}
    if wrapper == 'AmpOptimWrapper':
        options.update({'optim_wrapper.dtype': 'bfloat16', 'optim_wrapper.loss_scale': 1.0})
    plain = train(digits_config(digits, tmp_path / 'plain', **options)).model.state_dict()
    hook = dict(type='selfkd_mmpretrain.TFKDHook', alpha=0.0)
    looked = train(digits_config(digits, tmp_path / 'looked', hook, **options)).model.state_dict()
    for name, value in plain.items():
        assert torch.equal(looked[name], value), name
