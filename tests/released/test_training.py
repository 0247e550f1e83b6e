"""Training over several epochs: the authors' own loops against MMPretrain's Runner with our hooks, on the same batches.

Our run comes first and notes the batches it saw, augmentation and partners and all; their loop then gets these. Rates
are small: at 0.1 rounding grows from step to step. The control is the released loop against itself, started from
weights that were disturbed by 1e-15.
"""

import copy
import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import ROOT
from helpers.mmengine import counter, find_hook
from helpers.released_code import TO_OURS, TheirFRSKD, cskd, definitions, furthest, module, needs, pskd, state
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.registry import MODELS
from torch import nn

pytestmark = [needs('PS-KD-Pytorch', 'cs-kd', 'FRSKD'), pytest.mark.usefixtures('float64_without_cuda')]
SECTION = "Training: the authors' loop against the Runner with our hook; loss of each step, final weights"
EPOCHS, RATE, IMAGES, BATCH = 3, 1e-3, 8, 4


@MODELS.register_module(force=True)
class NotedInFloat64(ClsDataPreprocessor):
    """Hands the model float64, and notes what it hands over in training."""

    def forward(self, data, training=False):
        out = super().forward(data, training)
        out['inputs'] = out['inputs'].double()
        if training:
            self.noted.append((out['inputs'], torch.cat([sample.gt_label for sample in out['data_samples']])))
        return out


class Follow(Hook):
    """Starts from given weights, and notes the batches and the losses of every step."""

    priority = 'LOWEST'

    def __init__(self, weights):
        self.weights, self.epochs = weights, []

    def before_train(self, runner):
        runner.model.load_state_dict(self.weights, strict=False)

    def before_train_epoch(self, runner):
        self.epochs.append([])

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        runner.model.data_preprocessor.noted = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        hooks = {type(hook).__name__: hook for hook in runner.hooks}
        indices = hooks['PSKDHook'].past.rows if 'PSKDHook' in hooks else None
        parts = runner.model.data_preprocessor.noted  # CS-KD's partners are the second
        loss = outputs['loss'].item() + outputs.get('loss_cskd', torch.zeros(())).item()  # 'loss' is the head's own
        batch = [torch.cat([part[i] for part in parts]) for i in range(2)]
        self.epochs[-1].append((*batch, indices, loss))

    def losses(self):
        return torch.tensor([batch[-1] for epoch in self.epochs for batch in epoch])


def run(config, weights, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / 'data/cifar-100-python'
    folder.mkdir(parents=True)
    content = {
        'data': rng.integers(0, 256, (IMAGES, 3072), dtype=np.uint8),
        'fine_labels': [i % 5 for i in range(IMAGES)],
    }
    for part in ('train', 'test'):
        (folder / part).write_bytes(pickle.dumps(content))
    (folder / 'meta').write_bytes(pickle.dumps({'fine_label_names': [f'class{i}' for i in range(100)]}))
    monkeypatch.setattr('mmpretrain.datasets.cifar.check_md5', lambda *_: True)
    cfg = Config.fromfile(ROOT / f'configs/mmpretrain/{config}.py')
    cfg.merge_from_dict(
        {
            'work_dir': str(tmp_path),
            'experiment_name': f'released{next(counter)}',
            'log_level': 'ERROR',
            'data_preprocessor.type': 'NotedInFloat64',
            'train_dataloader.batch_size': BATCH,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'train_dataloader.dataset.data_root': str(tmp_path / 'data'),
            'train_cfg.max_epochs': EPOCHS,
            'param_scheduler.milestones': [2],
            'optim_wrapper.optimizer.lr': RATE,
        }
    )
    for part in ('val', 'test'):
        for name in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{part}_{name}'] = None
    runner = Runner.from_cfg(cfg)
    runner.model.double()
    follow = Follow(weights)
    runner.register_hook(follow)
    runner.train()
    return runner, follow


class Batches:
    """An epoch's batches as a loader."""

    def __init__(self, batches, classes):
        self.batches, self.dataset = batches, SimpleNamespace(classes=classes)

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def sgd(params, nesterov, rate=RATE):
    decay = 5e-4 if nesterov else 1e-4
    return torch.optim.SGD(params, lr=rate, momentum=0.9, weight_decay=decay, nesterov=nesterov)


def noted_losses(monkeypatch):
    """What is trained on in a released loop: the losses whose backward it calls."""
    values, backward = [], torch.Tensor.backward

    def note(loss, *args, **kwargs):
        values.append(loss.item())
        return backward(loss, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, 'backward', note)
    return values


def disturbed(net):
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 1e-15 * torch.randn_like(p))
    return other


def pskd_loop(net, epochs):
    script = definitions(
        'PS-KD-Pytorch',
        'main.py',
        ['train', 'accuracy', 'get_learning_rate', 'adjust_learning_rate'],
        torch=torch,
        F=F,
        dist=dist,
        logging=logging,
        AverageMeter=module('PS-KD-Pytorch', 'utils.AverageMeter').AverageMeter,
        progress_bar=lambda *args: None,
    )
    criterion = module('PS-KD-Pytorch', 'loss.pskd_loss').Custom_CrossEntropy_PSKD()
    args = SimpleNamespace(
        PSKD=True, distributed=False, gpu=None, rank=0, lr=RATE, lr_decay_schedule=[2], lr_decay_rate=0.1
    )
    optimizer = sgd(net.parameters(), nesterov=True)
    table = torch.zeros(IMAGES, 100)
    for epoch, batches in enumerate(epochs):
        script['adjust_learning_rate'](optimizer, epoch, args)
        alpha = 0.8 * ((epoch + 1) / EPOCHS)
        loader = Batches([batch[:3] for batch in batches], range(100))
        table = script['train'](table, None, criterion, optimizer, net, epoch, alpha, loader, args)
    return table


def cskd_loop(net, epochs):
    optimizer = sgd(net.parameters(), nesterov=False)
    given = dict(
        nn=nn,
        torch=torch,
        logging=logging,
        net=net,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        progress_bar=lambda *args: None,
        use_cuda=False,
        args=SimpleNamespace(cls=True, lamda=1.0, lr=RATE, epoch=200),
    )
    script = definitions('cs-kd', 'train.py', ['train', 'KDLoss', 'adjust_learning_rate'], **given)
    script['kdloss'] = script['KDLoss'](4.0)
    for epoch, batches in enumerate(epochs):
        script['trainloader'] = [batch[:2] for batch in batches]
        script['train'](epoch)
        script['adjust_learning_rate'](optimizer, {1: 100}.get(epoch, 0))  # the rate falls after the second epoch


def compare(name, measured, monkeypatch, weights, config, loop, net, map_state, tmp_path, tolerance):
    runner, follow = run(config, weights, tmp_path, monkeypatch)
    other = disturbed(net)
    losses = noted_losses(monkeypatch)
    result = loop(net, follow.epochs)
    expected = torch.tensor(losses)
    loop(other, follow.epochs)
    control = (torch.tensor(losses[len(expected) :]) - expected).abs().max().item()
    mine = {k: v for k, v in state(runner.model).items() if 'preprocessor' not in k}
    found = dict(
        losses=(follow.losses() - expected).abs().max().item(),
        weights=furthest(map_state(net), mine),
        control=control,
    )
    measured(SECTION, name, steps=str(len(expected)), **found)
    assert len(follow.epochs) == EPOCHS
    assert len(expected) == EPOCHS * IMAGES // BATCH
    assert max(found['losses'], found['weights']) < tolerance, found
    return runner, result


def test_pskd(measured, monkeypatch, tmp_path):
    """Our table is float32, which the tolerance is for; theirs is, too, but here in float64."""
    net = pskd('CIFAR_ResNet18_preActBasic', num_classes=100)().double()
    to_ours = lambda net: TO_OURS['preact'](state(net))  # noqa: E731
    config = 'pskd/preact-resnet18_1xb128-300e_cifar100_pskd'
    runner, table = compare(
        'PS-KD, PreAct ResNet-18', measured, monkeypatch, to_ours(net), config, pskd_loop, net, to_ours, tmp_path, 1e-6
    )
    mine = find_hook(runner, 'PSKDHook').past.bank.read(torch.arange(IMAGES))
    off = (table - mine).abs().max().item()
    measured(SECTION, 'PS-KD, PreAct ResNet-18', table_of_predictions=off)
    assert off < 1e-6


def test_cskd(measured, monkeypatch, tmp_path):
    net = cskd('CIFAR_ResNet18', 100)().double()
    to_ours = lambda net: TO_OURS['preact'](state(net))  # noqa: E731
    config = 'cskd/preact-resnet18_1xb128-200e_cifar100_cskd'
    compare(
        'CS-KD, PreAct ResNet-18', measured, monkeypatch, to_ours(net), config, cskd_loop, net, to_ours, tmp_path, 1e-11
    )


class TheirNet(nn.Module):
    """All of FRSKD's, to be copied and disturbed as one, and its loop."""

    def __init__(self, network):
        super().__init__()
        self.frskd = TheirFRSKD(network, 100)
        self.all = self.frskd.all

    def loop(self, epochs, rate=RATE):
        optimizer = sgd(self.all.parameters(), nesterov=False, rate=rate)
        scheduler = module('FRSKD', 'classification.utils').lr_scheduler(optimizer, 'step', [2], 0.1, EPOCHS)
        for batches in epochs:
            self.frskd.train([batch[:2] for batch in batches], optimizer)
            scheduler.step()


@pytest.mark.parametrize(
    ('network', 'mapping', 'config'),
    [
        ('cifarresnet18', 'resnet', 'frskd/resnet18-cifar_1xb128-200e_cifar100_frskd'),
        ('wrn16x2', 'wrn', 'frskd/wrn16-2_1xb128-200e_cifar100_frskd'),
    ],
)
def test_frskd(network, mapping, config, measured, monkeypatch, tmp_path):
    def to_ours(net):
        return net.frskd.map(state, mapping)

    net = TheirNet(network)
    name = f'FRSKD, {network}'
    compare(name, measured, monkeypatch, to_ours(net), config, TheirNet.loop, net, to_ours, tmp_path, 1e-11)


def test_rounding_grows_with_the_rate(measured):
    """Why the rates here are small: the released code against itself at the papers' rate."""
    start = TheirNet('wrn16x2')
    epochs = [[(torch.randn(BATCH, 3, 32, 32), torch.randint(100, (BATCH,))) for _ in range(5)] for _ in range(EPOCHS)]
    off = {}
    for rate in (RATE, 0.1):
        nets = copy.deepcopy(start), disturbed(start)
        for net in nets:
            net.loop(epochs, rate)
        off[rate] = furthest(*(state(net.all) for net in nets))
        measured(
            'The control: weights of the released WRN-16-2 with FRSKD after 15 steps', f'rate {rate}', control=off[rate]
        )
    assert off[0.1] > 10 * off[RATE]
