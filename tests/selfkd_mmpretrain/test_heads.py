"""Heads of several classifiers or several labels, and models that classify without a head of MMPretrain's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.mmengine import digits_config, find_hook, train
from mmengine.hooks import Hook
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.registry import MODELS
from torch import nn

PSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)
CSKD = dict(type='selfkd_mmpretrain.CSKDHook', temperature=3.0, weight=2.0)


class Calls(Hook):
    """Keeps what the loss module was called with in each step, what it gave, and what was trained on."""

    priority = 'VERY_HIGH'  # its tap is set before the plugin's

    def before_train(self, runner):
        self.steps = []
        getattr(runner.model, 'head', runner.model).loss_module.register_forward_hook(self._record)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.calls = []

    def _record(self, module, args, output):
        if torch.is_grad_enabled():
            self.calls.append((*(x.detach().clone() for x in args[:2]), float(output)))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        logged = {name: float(value) for name, value in outputs.items()}
        self.steps.append(dict(logged, calls=self.calls, epoch=runner.epoch))


class Past(Hook):
    """Keeps what PS-KD's copy predicts in each step, beside what the loss module is called with."""

    priority = 'VERY_LOW'

    def before_train(self, runner):
        hook, self.probs = find_hook(runner, 'PSKDHook'), []
        inner = hook._probs
        hook._probs = lambda model, inputs: self.probs.append(inner(model, inputs)) or self.probs[-1]


def config(digits, folder, *hooks, **options):
    cfg = digits_config(digits, folder, *hooks, **options)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    return cfg


# Several classifiers


@MODELS.register_module()
class TwoFeatures(nn.Module):
    """A neck that gives what Conformer's backbone gives: features of two kinds."""

    def forward(self, maps):
        return ([maps[-1].mean((2, 3)), maps[-1].amax((2, 3))],)


@MODELS.register_module()
class OwnTwoHead(LinearClsHead):
    """A user's head of two classifiers, whose losses come in the other order, and an auxiliary one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.other, self.auxiliary = nn.Linear(32, 10), nn.Linear(32, 10)

    def forward(self, feats):
        return self.fc(feats[-1][0]), self.other(feats[-1][1])

    def _get_loss(self, scores, data_samples):
        label = torch.cat([sample.gt_label for sample in data_samples])
        scores = scores[1], self.auxiliary(torch.ones_like(self.auxiliary.weight[:1])).expand(len(label), -1), scores[0]
        return {'loss': sum(self.loss_module(score, label) for score in scores)}


@MODELS.register_module()
class ZeroHead(LinearClsHead):
    """A classifier that begins at zero, behind an auxiliary one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.auxiliary = nn.Linear(32, 10)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self.init_cfg = None

    def _get_loss(self, score, data_samples):
        label = torch.cat([sample.gt_label for sample in data_samples])
        auxiliary = self.auxiliary(torch.ones_like(self.auxiliary.weight[:1])).expand(len(label), -1)
        return {'loss': sum(self.loss_module(x, label) for x in (auxiliary, score))}


def test_an_auxiliary_classifier_is_not_taken_for_one_that_begins_at_zero(digits, tmp_path):
    calls, past = Calls(), Past()
    options = {'model.head.type': 'ZeroHead'}
    train(config(digits, tmp_path, dict(PSKD, teacher='snapshot'), **options), calls, past)
    for step, probs in zip(calls.steps[5:], past.probs):
        alpha, ((first, label, _), (logits, _, _)) = 0.8 * (step['epoch'] + 1) / 3, step['calls']
        hard = F.one_hot(label, 10).float()
        expected = F.cross_entropy(first, hard) + F.cross_entropy(logits, (1 - alpha) * hard + alpha * probs[..., 0])
        assert step['loss'] == pytest.approx(expected.item(), rel=1e-4)


TWO = {'model.neck.type': 'TwoFeatures', 'model.head.type': 'ConformerHead', 'model.head.in_channels': [32, 32]}
OWN = {'model.neck.type': 'TwoFeatures', 'model.head.type': 'OwnTwoHead'}


@pytest.mark.parametrize(('options', 'places'), [(TWO, [0, 1]), (OWN, [1, None, 0])])
def test_each_classifier_learns_from_its_own_past(digits, tmp_path, options, places):
    hook = PSKD if options is TWO else dict(PSKD, teacher='snapshot')
    calls, past = Calls(), Past()
    runner = train(config(digits, tmp_path, hook, **options), calls, past)
    assert find_hook(runner, 'PSKDHook').source == 'snapshot'
    for step, probs in zip(calls.steps[5:], past.probs):
        alpha, expected = 0.8 * (step['epoch'] + 1) / 3, 0
        for place, (logits, label, _) in zip(places, step['calls']):
            hard = F.one_hot(label, 10).float()
            target = hard if place is None else (1 - alpha) * hard + alpha * probs[..., place]
            expected += F.cross_entropy(logits, target).item()
        assert step['loss'] == pytest.approx(expected, rel=1e-4)
    assert calls.steps[-1]['loss'] != pytest.approx(sum(plain for *_, plain in calls.steps[-1]['calls']), rel=1e-3)
    assert len(past.probs) == 10
    assert (past.probs[-1][..., 0] - past.probs[-1][..., 1]).abs().max() > 1e-3


def test_two_classifiers_are_refused_by_the_bank(digits, tmp_path):
    with pytest.raises(ValueError, match="the two classifiers of ConformerHead .* set teacher='snapshot'"):
        train(config(digits, tmp_path, dict(PSKD, teacher='bank'), **TWO))
    with pytest.raises(RuntimeError, match="a head with 2 predictions of a sample, .* set teacher='snapshot'"):
        train(config(digits, tmp_path, PSKD, **OWN))
    with pytest.raises(ValueError, match='TFKDHook: ConformerHead has two classifiers with a loss each'):
        train(config(digits, tmp_path, dict(type='selfkd_mmpretrain.TFKDHook'), **TWO))
    with pytest.raises(RuntimeError, match='TFKDHook: OwnTwoHead gives 2 predictions of a sample, and one is needed'):
        train(config(digits, tmp_path, dict(type='selfkd_mmpretrain.TFKDHook'), **OWN))


@pytest.mark.parametrize('options', [TWO, OWN])
def test_each_classifier_learns_from_its_own_partner(digits, tmp_path, options):
    """Recomputed in the first step, on a copy of the model in which partners go after the anchors."""

    class Before(Hook):
        priority = 'VERY_LOW'  # after CSKDHook took the partners out

        def before_train(self, runner):
            for parameter in runner.model.head.parameters():  # far apart: a KL of 1e-4 is lost in float32's rounding
                parameter.data.mul_(10)

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 0:
                model, partners = MODELS.build(runner.cfg.model), find_hook(runner, 'CSKDHook')._partners
                model.load_state_dict(runner.model.state_dict())
                inputs = runner.model.data_preprocessor(copy.deepcopy(partners))['inputs']
                self.logits = model.train()(inputs)

    calls, before = Calls(), Before()
    train(config(digits, tmp_path, CSKD, **options), calls, before)
    step, expected = calls.steps[0], 0
    for place, partner in enumerate(before.logits):
        logits = step['calls'][place if options is TWO else 2 - 2 * place][0].double()
        q = F.softmax(partner.double() / 3, 1)
        expected += 2 * 9 * (q * (q.log() - F.log_softmax(logits / 3, 1))).sum(1).mean().item()
    assert expected > 0.1
    assert step['loss_cskd'] == pytest.approx(expected, rel=1e-3)


@MODELS.register_module()
class MovingHead(OwnTwoHead):
    """Its loss module is called more often in later steps."""

    def _get_loss(self, scores, data_samples):
        loss = super()._get_loss(scores, data_samples)
        self.steps = getattr(self, 'steps', 0) + 1
        if self.steps > 3:
            self.loss_module(scores[0].detach(), torch.cat([sample.gt_label for sample in data_samples]))
        return loss


def test_calls_that_change_in_number_are_an_error(digits, tmp_path):
    cfg = config(digits, tmp_path, dict(PSKD, teacher='snapshot'), **{**OWN, 'model.head.type': 'MovingHead'})
    with pytest.raises(RuntimeError, match='is called 3 times in a training step of this epoch, and in another more'):
        train(cfg)


# Several labels

LABELS = {
    'model.head': dict(type='MultiLabelLinearClsHead', num_classes=10, in_channels=32),
    'data_preprocessor.to_onehot': True,
}
SMOOTH = dict(type='LabelSmoothLoss', label_smooth_val=0.1, num_classes=10, mode='multi_label', use_sigmoid=True)
WEIGHTED = dict(type='CrossEntropyLoss', use_sigmoid=True, class_weight=[0.5] * 5 + [2.0] * 5, loss_weight=3.0)


@pytest.mark.parametrize('loss', [dict(type='CrossEntropyLoss', use_sigmoid=True), WEIGHTED, SMOOTH])
def test_a_sigmoid_for_each_class_learns_from_the_pasts(digits, tmp_path, loss):
    """The binary cross-entropy with mixed targets; a smoothed label is the hard part."""
    calls, past = Calls(), Past()
    options = {**LABELS, 'model.head.loss': loss}
    runner = train(config(digits, tmp_path, PSKD, **options), calls, past)
    assert find_hook(runner, 'PSKDHook').source == 'snapshot'
    weight = torch.tensor(loss.get('class_weight', [1.0] * 10)) * loss.get('loss_weight', 1.0)
    for step, probs in zip(calls.steps[5:], past.probs):
        ((logits, label, plain),) = step['calls']
        hard = label.float().clamp(0.1, 0.9) if loss is SMOOTH else label.float()
        alpha = 0.8 * (step['epoch'] + 1) / 3
        target = (1 - alpha) * hard + alpha * probs[..., 0]
        entries = -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits))
        assert step['loss'] == pytest.approx((entries * weight).sum().item() / len(logits), rel=1e-4)
        assert step['loss'] != pytest.approx(plain, rel=1e-4)
        assert step['pskd_hard'] + step['pskd_soft'] == pytest.approx(step['loss'], rel=1e-5)
        entropy = torch.distributions.Bernoulli(probs[..., 0]).entropy().sum(1).mean().item()
        assert step['pskd_entropy'] == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize(
    ('hook', 'loss', 'message'),
    [
        (dict(PSKD, teacher='bank'), {}, "predicts a sigmoid for each class, .* set teacher='snapshot'"),
        (PSKD, dict(pos_weight=[2.0] * 10), 'remove pos_weight from model.head.loss'),
        (PSKD, dict(use_sigmoid=False, use_soft=True), r'use CrossEntropyLoss\(use_sigmoid=True\)'),
        (PSKD, dict(type='AsymmetricLoss'), 'trains with AsymmetricLoss, which is not the cross-entropy'),
        (CSKD, {}, 'a sigmoid for each class, but a prediction is one softmax over classes here'),
    ],
)
def test_what_cannot_be_taught_of_several_labels_is_refused(digits, tmp_path, hook, loss, message):
    options = {**LABELS, 'model.head.loss': dict(type='CrossEntropyLoss', use_sigmoid=True)}
    cfg = config(digits, tmp_path, hook, **options)
    cfg.model.head.loss.update(loss)
    if 'type' in loss:
        cfg.model.head.loss = loss
    with pytest.raises(ValueError, match=message):
        train(cfg)


# Models without a head of MMPretrain's


def wrapped(kind, folder):
    if kind == 'TimmClassifier':
        pytest.importorskip('timm')
        return dict(type=kind, model_name='test_resnet', num_classes=10)
    transformers = pytest.importorskip('transformers')
    network = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic', num_labels=10
    )
    network.save_pretrained(folder / 'network')
    return dict(type=kind, model_name=str(folder / 'network'))


@pytest.mark.parametrize('kind', ['TimmClassifier', 'HuggingFaceClassifier'])
@pytest.mark.parametrize('hook', [PSKD, dict(PSKD, teacher='snapshot'), CSKD])
def test_models_of_other_libraries(digits, tmp_path, kind, hook):
    cfg = config(digits, tmp_path, hook)
    cfg.model = wrapped(kind, tmp_path)
    runner = train(cfg, calls := Calls())
    for step in calls.steps[5:]:
        ((logits, label, plain),) = step['calls']
        assert step['loss_cskd'] > 0 if hook is CSKD else step['pskd_soft'] > 0
        assert (step['loss'] == pytest.approx(plain, rel=1e-5)) == (hook is CSKD)
    if hook is PSKD:
        bank = find_hook(runner, 'PSKDHook').past.bank
        assert bank.num_classes == 10
        assert bank.seen(torch.arange(40)).all()
