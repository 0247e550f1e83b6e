"""CS-KD in real MMPretrain training runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.mmengine import (
    Recorder,
    assert_same_state,
    by_iterations,
    digits_config,
    find_hook,
    train,
    train_in_processes,
)
from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset, ConcatDataset, DefaultSampler, pseudo_collate
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.models.utils import ClsDataPreprocessor

from selfkd_mmengine.pair_sampler import PairBatchSampler, class_of_each

CSKD = dict(type='selfkd_mmpretrain.CSKDHook', temperature=3.0, weight=2.0)
PSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)


def plain_pipeline(cfg):
    """Without random augmentation: mmengine does not save the random state of the pipeline."""
    cfg.train_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    return cfg


class Watch(Hook):
    """Copies the model and both halves of the batch before each step, and keeps what the step gave."""

    priority = 'VERY_LOW'  # after CSKDHook took the partners out

    def __init__(self):
        self.steps = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        partners = find_hook(runner, 'CSKDHook')._partners
        self.steps.append({'model': copy.deepcopy(plain_copy(runner.model)), 'batch': data_batch, 'partners': partners})

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1].update({k: float(v) for k, v in outputs.items()}, after=copy.deepcopy(runner.model.state_dict()))


def plain_copy(model):
    """A deep copy without torch hooks."""
    hooks = [(m, name, getattr(m, name)) for m in model.modules() for name in ('_forward_hooks', '_forward_pre_hooks')]
    for m, name, value in hooks:
        setattr(m, name, type(value)())
    clone = copy.deepcopy(model)
    for m, name, value in hooks:
        setattr(m, name, value)
    return clone


def restated(step, autocast):
    """The two losses of a step from the paper: a pass of the anchors, then one of the partners, on the same weights."""
    model = step['model'].train()
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        anchors = model.data_preprocessor(step['batch'], True)
        z = model.head(model.extract_feat(anchors['inputs'])).float()
        with torch.no_grad():
            partners = model.data_preprocessor(step['partners'], True)
            other = model.head(model.extract_feat(partners['inputs'])).float()
    y = torch.cat([sample.gt_label for sample in anchors['data_samples']])
    y_other = torch.cat([sample.gt_label for sample in partners['data_samples']])
    assert torch.equal(y, y_other)
    p, log_q = F.softmax(other / 3, 1), F.log_softmax(z / 3, 1)
    kl = 9 * (p * (p.log() - log_q)).sum(1).mean()
    return F.cross_entropy(z, y).item(), 2 * kl.item()


@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'AmpOptimWrapper', 'accumulation'])
def test_losses_and_running_statistics_recomputed(digits, tmp_path, wrapper, monkeypatch):
    # mmengine's wrapper asks for an accelerator, although its autocast works on the CPU
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    cfg = digits_config(digits, tmp_path, CSKD, **{'train_cfg.max_epochs': 2})
    if wrapper == 'AmpOptimWrapper':
        cfg.optim_wrapper.update(type=wrapper, dtype='bfloat16', loss_scale=1.0)
    elif wrapper == 'accumulation':
        cfg.optim_wrapper.accumulative_counts = 2
    watch = Watch()
    train(cfg, watch)
    assert len(watch.steps) == 10
    tolerance = 2e-2 if wrapper == 'AmpOptimWrapper' else 1e-4
    for step in watch.steps:
        ce, kl = restated(step, wrapper == 'AmpOptimWrapper')
        assert step['loss'] == pytest.approx(ce, rel=tolerance)
        assert step['loss_cskd'] == pytest.approx(kl, rel=tolerance, abs=1e-4)
        for name, value in step['model'].state_dict().items():
            if 'running' in name or 'num_batches' in name:  # both passes entered, each with its own statistics
                torch.testing.assert_close(step['after'][name], value, rtol=1e-3, atol=1e-4)
    assert max(step['loss_cskd'] for step in watch.steps) > 0.01


def test_the_term_is_trained_on(digits, tmp_path):
    """The first SGD step moves the weights by -lr times the gradient of both losses' sum."""
    cfg = plain_pipeline(digits_config(digits, tmp_path, CSKD, **{'train_cfg.max_epochs': 1}))
    cfg.optim_wrapper.optimizer = ConfigDict(type='SGD', lr=0.5)
    watch = Watch()
    train(cfg, watch)
    step = watch.steps[0]
    model = step['model'].train()
    anchors = model.data_preprocessor(step['batch'], True)
    z = model(anchors['inputs'])
    with torch.no_grad():
        other = model(model.data_preprocessor(step['partners'], True)['inputs'])
    y = torch.cat([sample.gt_label for sample in anchors['data_samples']])
    kl = F.kl_div(F.log_softmax(z / 3, 1), F.softmax(other / 3, 1), reduction='batchmean')
    (F.cross_entropy(z, y) + 2 * 9 * kl).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(step['after'][name], p.detach() - 0.5 * p.grad, rtol=1e-4, atol=1e-5)


def test_beside_pskd_in_any_order(digits, tmp_path):
    """PS-KD sees the anchors only, and what it makes of the loss does not touch CS-KD's term."""
    runs = []
    for i, hooks in enumerate([(PSKD, CSKD), (CSKD, PSKD)]):
        recorder = Recorder()
        runner = train(plain_pipeline(digits_config(digits, tmp_path / str(i), *hooks)), recorder)
        runs.append((recorder.steps, runner))
    (steps, runner), (other, _) = runs
    assert [s['loss'] for s in steps] == [s['loss'] for s in other]
    assert [s['loss_cskd'] for s in steps] == [s['loss_cskd'] for s in other]
    bank = find_hook(runner, 'PSKDHook').past.bank
    infos = map(runner.train_dataloader.dataset.get_data_info, range(40))
    rows = {info['img_path']: i for i, info in enumerate(infos)}
    before = torch.cat([s['logits'].softmax(1) for s in steps[5:10]])
    last = dict(zip((rows[p] for s in steps[5:10] for p in s['paths'][:8]), before))
    alpha = 0.8
    for step in steps[10:]:
        assert len(step['logits']) == 8
        past = torch.stack([last[rows[p]] for p in step['paths'][:8]])
        target = (1 - alpha) * F.one_hot(step['label'], 10) + alpha * past
        assert step['loss'] == pytest.approx(F.cross_entropy(step['logits'], target).item(), rel=1e-4)
    assert bank.seen(torch.arange(40)).all()


@pytest.mark.parametrize('loop', ['epoch', 'iteration'])
def test_beside_precise_batch_norm(digits, tmp_path, loop):
    """It reads the loader's batch size, which torch keeps for no loader with a batch sampler."""
    cfg = digits_config(digits, tmp_path, CSKD, dict(type='PreciseBNHook', num_samples=16, interval=2))
    if loop == 'iteration':
        cfg = by_iterations(cfg, 4)
        cfg.train_dataloader.batch_sampler = ConfigDict(type='selfkd_mmengine.PairBatchSampler')
        # What PreciseBNHook breaks off never gives a sample again where it is an InfiniteSampler, in plain runs too.
        cfg.train_dataloader.sampler.type = 'DefaultSampler'
    runner = train(cfg)
    assert runner.train_dataloader.batch_size == 8
    assert (runner.message_hub.log_scalars['train/loss_cskd'].data[0] > 0).all()


# Mixed batches


class Mixing(Hook):
    """Keeps the mixed batches, of anchors and of partners, and the model of each step."""

    priority = 'VERY_LOW'

    def before_train(self, runner):
        self.steps = []
        runner.model.data_preprocessor.register_forward_hook(self._keep)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.steps.append(dict(model=copy.deepcopy(plain_copy(runner.model)), batches=[]))

    def _keep(self, module, args, output):
        if not args[1]:  # for evaluation
            return
        scores = torch.stack([sample.gt_score for sample in output['data_samples']])
        self.steps[-1]['batches'].append((output['inputs'].clone(), scores))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1].update({name: float(value) for name, value in outputs.items()})


def mixed(digits, folder, *hooks, augments=(dict(type='Mixup', alpha=1.0), dict(type='CutMix', alpha=1.0))):
    options = {'data_preprocessor.batch_augments': dict(augments=list(augments)), 'train_cfg.max_epochs': 2}
    return digits_config(digits, folder, *hooks, **options)


def test_partners_are_mixed_as_their_anchors(digits, tmp_path):
    """Their labels are the same, the term is recomputed, and anchors are mixed as in plain training."""
    train(mixed(digits, tmp_path / 'plain'), plain := Mixing())
    train(mixed(digits, tmp_path / 'ours', CSKD), ours := Mixing())
    for step, expected in zip(ours.steps, plain.steps):
        (anchors, scores), (partners, partner_scores) = step['batches']
        assert torch.equal(partner_scores, scores)
        assert torch.equal(anchors, expected['batches'][0][0])
        assert not torch.equal(anchors, partners)
        model = step['model'].train()
        with torch.no_grad():
            z, other = model(anchors), model(partners)
        p = F.softmax(other / 3, 1)
        kl = 9 * (p * (p.log() - F.log_softmax(z / 3, 1))).sum(1).mean().item()
        assert step['loss_cskd'] == pytest.approx(2 * kl, rel=1e-3, abs=1e-5)
    assert sum(bool((scores % 1 > 0).any()) for scores in (step['batches'][0][1] for step in ours.steps)) > 5


class MixesAnew:
    """Mixes each batch with another share, whatever the random state."""

    share = 0.0

    def __call__(self, inputs, scores):
        self.share += 0.01
        return [self.share * x + (1 - self.share) * x.roll(1, 0) for x in (inputs, scores.float())]


def test_partners_that_are_mixed_in_another_way_are_refused(digits, tmp_path):
    with pytest.raises(ValueError, match='or mix them in another way than their partners'):
        train(mixed(digits, tmp_path, CSKD, augments=[MixesAnew()]))


def test_mixing_beside_pskd(digits, tmp_path):
    log = train(mixed(digits, tmp_path, CSKD, PSKD)).message_hub.log_scalars
    assert (log['train/loss_cskd'].data[0] > 0).all()
    assert (log['train/pskd_soft'].data[0][5:] > 0).all()


# Samples that are moved


def move_partners(batch):
    """Gives each anchor the partner of the one before it."""
    half = len(batch) // 2
    return pseudo_collate(batch[:half] + batch[-1:] + batch[half:-1])


class MovesSamples(ClsDataPreprocessor):
    """Hands the samples over in another order."""

    def forward(self, data, training=False):
        data = super().forward(data, training)
        samples = data['data_samples']
        return dict(inputs=data['inputs'].roll(1, 0), data_samples=samples[-1:] + samples[:-1])


@pytest.mark.parametrize(
    ('where', 'name'), [('loader', 'CSKDHook'), ('loader', 'DDGSDHook'), ('preprocessor', 'CSKDHook')]
)
def test_samples_that_are_no_pairs_any_more_are_refused(digits, tmp_path, where, name):
    cfg = digits_config(digits, tmp_path, dict(type=f'selfkd_mmpretrain.{name}'))
    if where == 'loader':
        cfg.train_dataloader.collate_fn = dict(type=move_partners)
    else:
        cfg.data_preprocessor.type = MovesSamples
    with pytest.raises(ValueError, match=f'{name}: the samples of a batch are not the pairs that its sampler chose'):
        train(cfg)


# The sampler


class Labels(BaseDataset):
    """Knows its labels and has no images."""

    def __init__(self, labels):
        self.labels = labels
        super().__init__(pipeline=[])

    def load_data_list(self):
        return [{} if label is None else {'gt_label': label} for label in self.labels]

    def prepare_data(self, idx):
        raise AssertionError('an image was loaded')


def batches(labels, epoch=0, rank=0, monkeypatch=None, **kwargs):
    dataset = labels if hasattr(labels, 'get_data_info') else Labels(labels)
    sampler = DefaultSampler(dataset, shuffle=True, seed=3)
    sampler.set_epoch(epoch)
    return list(PairBatchSampler(sampler, 4, **kwargs))


def test_anchors_are_the_plain_batches_and_partners_of_their_classes():
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 0, 5]
    sampler = DefaultSampler(Labels(labels), shuffle=True, seed=3)
    plain = list(sampler)
    out = batches(labels)
    assert [len(b) for b in out] == [8, 8, 4]
    assert [i for b in out for i in b[: len(b) // 2]] == plain
    for b in out:
        anchors, partners = b[: len(b) // 2], b[len(b) // 2 :]
        assert [labels[i] for i in anchors] == [labels[i] for i in partners]
    assert [len(b) for b in batches(labels, drop_last=True)] == [8, 8]


def test_draws_follow_from_seed_epoch_and_rank(monkeypatch):
    labels = [0, 1] * 20
    assert batches(labels) == batches(labels)
    partners = [i for b in batches(labels) for i in b[4:]]
    assert partners != [i for b in batches(labels, seed=4) for i in b[4:]]
    other_epoch = batches(labels, epoch=1)
    assert partners != [i for b in other_epoch for i in b[4:]]
    monkeypatch.setattr('selfkd_mmengine.pair_sampler.get_rank', lambda: 1)
    assert partners != [i for b in batches(labels) for i in b[4:]]


def test_through_wrappers_partners_come_from_the_whole_set():
    concat = ConcatDataset([Labels([0, 1]), Labels([1, 1, 4])])
    assert class_of_each(concat) == [0, 1, 1, 1, 4]
    drawn = {
        p
        for _ in range(30)
        for b in batches(concat, seed=_)
        for a, p in zip(b[: len(b) // 2], b[len(b) // 2 :])
        if a == 1
    }
    assert drawn == {1, 2, 3}


@pytest.mark.parametrize('labels', [[0, None], [0, [1, 2]], [0, -1]])
def test_a_dataset_that_cannot_tell_the_class_is_refused(labels):
    with pytest.raises(ValueError, match='CS-KD needs one class per sample, but sample 1 has gt_label='):
        class_of_each(Labels(labels))


def test_a_foreign_dataset_is_refused():
    with pytest.raises(ValueError, match='list: cannot tell the class of a sample without loading it'):
        class_of_each([1, 2, 3])


# Refusals

LINEAR = dict(type='LinearClsHead', num_classes=10, in_channels=32)
MULTI_LABEL = dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='multi_label')


@pytest.mark.parametrize(
    ('hook', 'message'),
    [
        (dict(CSKD, temperature=0), 'temperature must be above 0, got 0'),
        (dict(CSKD, weight=-1), 'weight must be at least 0, got -1'),
    ],
)
def test_settings_that_cannot_work_are_refused(digits, tmp_path, hook, message):
    with pytest.raises(ValueError, match=message):
        Runner.from_cfg(digits_config(digits, tmp_path, hook))


def test_an_iteration_based_loop_must_ask_for_pairs(digits, tmp_path):
    with pytest.raises(ValueError, match='set train_dataloader.batch_sampler=dict'):
        train(by_iterations(digits_config(digits, tmp_path, CSKD), 4))


@pytest.mark.parametrize('hook', ['CSKDHook', 'TFKDHook', 'DDGSDHook'])
@pytest.mark.parametrize(
    ('head', 'message'),
    [
        (dict(type='MultiLabelLinearClsHead', num_classes=10, in_channels=32), 'MultiLabelLinearClsHead trains with'),
        (dict(LINEAR, loss=dict(type='FocalLoss')), 'LinearClsHead trains with FocalLoss, which is not the cross'),
        (dict(LINEAR, loss=MULTI_LABEL), 'LinearClsHead trains with LabelSmoothLoss'),
        (dict(type='ArcFaceClsHead', num_classes=10, in_channels=32), 'ArcFaceClsHead trains on logits with a margin'),
        (None, 'with the head NoneType has no loss_module of a classification'),
    ],
)
def test_heads_that_cannot_work_are_refused(digits, tmp_path, hook, head, message):
    cfg = digits_config(digits, tmp_path, dict(type=f'selfkd_mmpretrain.{hook}'))
    cfg.model.head = head
    with pytest.raises(ValueError, match=f'^{hook}: .*{message}'):
        train(cfg)


def test_two_processes(digits, tmp_path):
    """Each rank draws partners of its own over the whole set; the weights stay equal."""
    (tmp_path / 'dump.py').write_text(
        """
import os, torch
from mmengine.hooks import Hook
from helpers.mmengine import find_hook
class Dump(Hook):
    priority = 'VERY_LOW'
    def before_train(self, runner):
        self.pairs = []
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        other = find_hook(runner, 'CSKDHook')._partners
        self.pairs += [(a.img_path, int(a.gt_label), b.img_path, int(b.gt_label)) for a, b in
                       zip(data_batch['data_samples'], other['data_samples'])]
    def after_train(self, runner):
        torch.save((self.pairs, dict(runner.model.named_parameters())), os.path.join(runner.work_dir,
        f'rank{runner.rank}.pth'))
"""
    )
    cfg = digits_config(digits, tmp_path / 'run', dict(type='dump.Dump'), CSKD)
    train_in_processes(cfg, tmp_path)
    (pairs, weights), (others, other_weights) = (torch.load(tmp_path / f'run/rank{rank}.pth') for rank in range(2))
    assert len(pairs) == len(others) == 3 * 20
    assert all(a == b for _, a, _, b in pairs + others)
    assert {p for p, *_ in pairs[:20]} & {p for p, *_ in others[:20]} == set()  # anchors are split
    assert {p[2] for p in pairs[:20]} & {p[0] for p in others[:20]}  # partners are not
    assert_same_state(weights, other_weights)
