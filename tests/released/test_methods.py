"""Every method and variant against the authors' code: each loss term, every gradient, batch-norm statistics."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.released_code import TheirFRSKD, definitions, furthest, gradients, module, needs, ours, state
from mmpretrain.registry import BATCH_AUGMENTS
from mmpretrain.structures import DataSample
from torch import nn

from selfkd.losses import cskd_loss, pskd_loss

pytestmark = [needs('PS-KD-Pytorch', 'cs-kd', 'FRSKD'), pytest.mark.usefixtures('float64_without_cuda')]
SECTION = 'Methods: loss terms, gradients with respect to all weights, running statistics'


def logits_and_labels():
    return torch.randn(6, 10, requires_grad=True), torch.arange(6) % 4, torch.randn(6, 10)


def test_pskd_loss(measured):
    theirs = module('PS-KD-Pytorch', 'loss.pskd_loss').Custom_CrossEntropy_PSKD()
    logits, labels, past = logits_and_labels()
    past, alpha = past.softmax(1), 0.3
    expected = theirs(logits, (1 - alpha) * F.one_hot(labels, 10) + alpha * past)
    found = pskd_loss(logits, labels, past, alpha)
    (first,), (second,) = (torch.autograd.grad(loss, logits) for loss in (expected, found))
    loss, gradient = abs(found / expected - 1).item(), furthest({'': first}, {'': second})
    measured(SECTION, 'PS-KD', largest_term=loss, gradients=gradient)
    assert max(loss, gradient) < 1e-12


def test_cskd_loss(measured):
    their_kl = definitions('cs-kd', 'train.py', ['KDLoss'], nn=nn, torch=torch)['KDLoss'](4.0)
    logits, labels, partners = logits_and_labels()
    expected = F.cross_entropy(logits, labels) + 3 * their_kl(logits, partners)
    found = cskd_loss(logits, labels, partners, temperature=4.0, weight=3.0)
    (first,), (second,) = (torch.autograd.grad(loss, logits) for loss in (expected, found))
    loss, gradient = abs(found / expected - 1).item(), furthest({'': first}, {'': second})
    measured(SECTION, 'CS-KD', largest_term=loss, gradients=gradient)
    assert max(loss, gradient) < 1e-12


VARIANTS = {
    'FRSKD': ('cifarresnet18', 'frskd/resnet18-cifar_1xb128-200e_cifar100_frskd', 'resnet', {}),
    'FRSKD, WRN-16-2': ('wrn16x2', 'frskd/wrn16-2_1xb128-200e_cifar100_frskd', 'wrn', {}),
    'FRSKD, ResNet-18, 224': ('resnet18', 'frskd/resnet18_1xb32-200e_cub200_frskd', 'resnet', {}),
    'FRSKD, soft labels only': (
        'cifarresnet18',
        'frskd/resnet18-cifar_1xb128-200e_cifar100_frskd-soft',
        'resnet',
        dict(beta=0),
    ),
    'FRSKD, hint': (
        'cifarresnet18',
        'frskd/resnet18-cifar_1xb128-200e_cifar100_frskd-hint',
        'resnet',
        dict(distill='fit'),
    ),
    'FRSKD, overhaul': (
        'cifarresnet18',
        'frskd/resnet18-cifar_1xb128-200e_cifar100_frskd-overhaul',
        'resnet',
        dict(distill='od', beta=1e-3),
    ),
    'FRSKD, overhaul, WRN-16-2': (
        'wrn16x2',
        'frskd/wrn16-2_1xb128-200e_cifar100_frskd',
        'wrn',
        dict(distill='od', beta=1e-3),
    ),
    'FRSKD + SLA': (
        'cifarresnet18',
        'frskd/resnet18-cifar_1xb128-200e_cifar100_frskd-sla',
        'resnet',
        dict(aux='sla', aux_lamb=1),
    ),
    'FRSKD + Mixup': (
        'cifarresnet18',
        'frskd/resnet18-cifar_1xb128-200e_cifar100_frskd-mixup',
        'resnet',
        dict(aug='mixup', aug_a=0.2),
    ),
    'FRSKD + CutMix': (
        'cifarresnet18',
        'frskd/resnet18-cifar_1xb128-200e_cifar100_frskd-cutmix',
        'resnet',
        dict(aug='cutmix', aug_a=1.0),
    ),
}


def ours_like(config, options, **how):
    """Our model; the variants without a config of their own are another one with options."""
    changes = {}
    if options.get('distill') == 'od' and 'overhaul' not in config:
        changes = {'model.self_teacher.feature_loss': 'overhaul', 'model.self_teacher.beta': options['beta']}
    return ours(config, **how, **changes)


def samples_of(targets):
    return [
        DataSample().set_gt_score(target) if targets.dim() == 2 else DataSample().set_gt_label(target)
        for target in targets
    ]


@pytest.mark.parametrize('name', VARIANTS)
def test_frskd(name, measured, monkeypatch):
    network, config, mapping, options = VARIANTS[name]
    monkeypatch.setattr(torch, 'FloatTensor', torch.tensor)  # the margins of the overhaul loss, not rounded
    classes = 200 if '224' in name else 100
    theirs = TheirFRSKD(network, classes, **options)
    if hasattr(theirs.net, 'relu'):
        # WRN's last one would overwrite the map before it, which the overhaul loss asks for (docs/fidelity.md).
        theirs.net.relu.inplace = False
    mine = ours_like(config, options).double().train()
    mine.load_state_dict(theirs.map(state, mapping), strict=False)
    assert theirs.map(state, mapping).keys() == {k for k in state(mine) if 'loss_module' not in k}

    # Few images, so that the batch norms of the coarsest maps do not amplify rounding.
    images, labels = torch.randn(4, 3, *[64 if '224' in name else 32] * 2), torch.tensor([3, 50, 99, 3])
    kept = {}
    theirs.kd.register_forward_pre_hook(lambda module, args: kept.update(args=args))
    for seed in (np.random.seed, torch.manual_seed):
        seed(1)
    no_step = torch.optim.SGD(theirs.all.parameters(), lr=0)
    total, _ = theirs.train([(images.clone(), labels)], no_step)

    targets = labels
    for seed in (np.random.seed, torch.manual_seed):
        seed(1)
    if options.get('aug'):
        augment = BATCH_AUGMENTS.build(
            dict(type={'mixup': 'Mixup', 'cutmix': 'CutMix'}[options['aug']], alpha=options['aug_a'])
        )
        images, targets = augment.mix(images, F.one_hot(labels, classes).double())
    terms = mine.loss(images, samples_of(targets))
    sum(terms.values()).backward()

    # Before their adapters are called once more below.
    statistics = [
        {k: v.clone() for k, v in s.items() if '.running_' in k} for s in (theirs.map(state, mapping), state(mine))
    ]
    logits, teacher_logits, feats, refined = kept['args']
    with torch.no_grad():
        expected = {'loss_kd': theirs.args.alpha * theirs.kd.kd(logits, teacher_logits)}
        expected['loss_feature'] = theirs.kd(logits, teacher_logits, feats, refined) - expected['loss_kd']
        count = len(images)
        expected['loss_cls'] = F.cross_entropy(logits[:count], targets)
        expected['loss_teacher'] = F.cross_entropy(teacher_logits[:count], targets)
    off = {key: abs(terms[key] / value - 1).item() for key, value in expected.items() if key in terms and value}
    off['sum'] = abs(sum(terms.values()) / total - 1).item()
    grads = furthest(theirs.map(gradients, mapping), gradients(mine))
    found = dict(largest_term=max(off.values()), gradients=grads, running_statistics=furthest(*statistics))
    measured(SECTION, name, **found)
    assert set(terms) <= {*expected, 'loss_joint', 'loss_sla'}
    assert max(found.values()) < 1e-10, (off, found)


@pytest.mark.parametrize('name', ['FRSKD', 'FRSKD, WRN-16-2', 'FRSKD, hint', 'FRSKD, overhaul', 'FRSKD + SLA'])
def test_initial_self_teacher(name, measured):
    """Layers of one kind and shape together; what starts at 0 or 1 does in both."""
    network, config, mapping, options = VARIANTS[name]
    torch.set_default_dtype(torch.float32)
    theirs = TheirFRSKD(network, 100, **options).map(state, mapping)
    mine = state(ours_like(config, options, initialise=True))
    pairs = {}
    for key in (key for key in theirs if key.startswith('self_teacher') and '.running_' not in key):
        kind = ('adapters' in key, 'joint' in key, 'fc' in key, theirs[key].shape)
        for values, all_values in ((theirs, 0), (mine, 1)):
            pairs.setdefault(kind, ([], []))[all_values].append(values[key].double().flatten())
    off = 0.0
    for kind, parts in pairs.items():
        first, second = (torch.cat(part) for part in parts)
        assert first.mean().item() == pytest.approx(second.mean().item(), abs=0.1), kind
        if first.std() == 0:
            assert torch.equal(first, second), kind
        elif len(first) > 1000:
            off = max(off, abs(second.std() / first.std() - 1).item())
    measured(
        'Initial weights of the self-teacher: deviation of ours over theirs less 1 (a draw has noise)',
        name,
        all_layers=off,
    )
    assert off < 0.05
