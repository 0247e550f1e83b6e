"""The comparators of the papers' tables in real MMPretrain training runs: TF-KD, BYOT, DDGSD (beside the promises)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.mmengine import Recorder, by_iterations, digits_config, train, train_in_processes
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmpretrain.registry import MODELS

from selfkd.losses import byot_loss, ddgsd_loss, tfkd_regularization
from selfkd_mmpretrain.heads import target_of

TFKD = dict(type='selfkd_mmpretrain.TFKDHook', alpha=0.3, temperature=5.0, correct_prob=0.9)


def test_tfkd_regularization_by_hand():
    """Two classes, u = (0.9, 0.1), T = 1: the teacher is softmax(u) = (e^0.8, 1) / (1 + e^0.8)."""
    z = torch.tensor([[0.0, 1.0]])
    teacher = torch.tensor([0.9, 0.1]).softmax(0)
    expected = (teacher * (teacher.log() - z[0].log_softmax(0))).sum()
    got = tfkd_regularization(z, torch.tensor([0]), temperature=1.0, correct_prob=0.9)
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


@pytest.mark.parametrize(
    ('hooks', 'options', 'message'),
    [
        ([dict(TFKD, alpha=1.5)], {}, r'alpha must lie in \[0, 1\], got 1.5'),
        ([dict(TFKD, correct_prob=0)], {}, 'correct_prob must be above 0'),
        ([TFKD, dict(type='selfkd_mmpretrain.PSKDHook')], {}, 'use one of the two hooks'),
        (
            [TFKD],
            {'data_preprocessor.batch_augments': dict(augments=dict(type='Mixup', alpha=0.2))},
            'remove batch_augments',
        ),
    ],
)
def test_tfkd_refusals(digits, tmp_path, hooks, options, message):
    with pytest.raises(ValueError, match=message):
        train(digits_config(digits, tmp_path, *hooks, **options))


# BYOT


def byot_config(digits, work_dir, *hooks, **options):
    cfg = digits_config(digits, work_dir, *hooks, **options)
    cfg.model.backbone.out_indices = (0, 1, 2, 3)
    cfg.model.neck = None
    cfg.model.head = ConfigDict(
        type='selfkd_mmpretrain.BYOTClsHead', num_classes=10, in_channels=[4, 8, 16, 32], alpha=0.3, beta=0.01
    )
    return cfg


class Watch(Hook):
    """Copies the model and the batch before each step, and keeps what the step gave."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.steps = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        hooks = [
            (m, name, getattr(m, name))
            for m in runner.model.modules()
            for name in ('_forward_hooks', '_forward_pre_hooks')
        ]
        for m, name, value in hooks:
            setattr(m, name, type(value)())
        self.steps.append({'model': copy.deepcopy(runner.model), 'batch': data_batch})
        for m, name, value in hooks:
            setattr(m, name, value)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1].update({k: float(v) for k, v in outputs.items()})


def test_byot_recomputed(digits, tmp_path):
    watch = Watch()
    train(byot_config(digits, tmp_path, **{'train_cfg.max_epochs': 1}), watch)
    for step in watch.steps:
        model = step['model'].train()
        data = model.data_preprocessor(step['batch'], True)
        maps, y = model.backbone(data['inputs']), target_of(data['data_samples'])
        deep = maps[-1].mean((2, 3))
        z = model.head.fc(deep)
        shallow = [b(m).mean((2, 3)) for b, m in zip(model.head.auxiliary['branches'], maps)]
        scores = [fc(v) for fc, v in zip(model.head.auxiliary['fcs'], shallow)]
        p = (z / 3).softmax(1)
        kd = sum(9 * (p * (p.log() - (s / 3).log_softmax(1))).sum(1).mean() for s in scores)
        expected = {
            'loss_cls': 0.7 * F.cross_entropy(z, y),
            'loss_aux': 0.7 * sum(F.cross_entropy(s, y) for s in scores),
            'loss_kd': 0.3 * kd,
            'loss_feature': 0.01 * sum((v - deep).square().sum(1).mean() for v in shallow),
        }
        for name, value in expected.items():
            assert step[name] == pytest.approx(value.item(), rel=1e-3), name
        assert step['loss'] == pytest.approx(sum(expected.values()).item(), rel=1e-4)
        whole = byot_loss(z, scores, deep, shallow, y, alpha=0.3, beta=0.01)
        assert sum(whole.values()).item() == pytest.approx(step['loss'], rel=1e-4)


def test_byot_teacher_is_a_constant():
    z, f = torch.randn(2, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    s, v = torch.randn(2, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    sum(byot_loss(z, [s], f, [v], None, alpha=0.5, beta=1.0).values()).backward()
    assert z.grad is None
    assert f.grad is None
    assert s.grad.abs().sum() > 0
    assert v.grad.abs().sum() > 0


def test_byot_beside_pskd(digits, tmp_path):
    recorder = Recorder()
    train(byot_config(digits, tmp_path, dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)), recorder)
    last = recorder.steps[-1]
    assert last['loss_cls'] == pytest.approx(0.7 * (last['pskd_hard'] + last['pskd_soft']), rel=1e-5)


@pytest.mark.parametrize(
    ('head', 'message'),
    [({'in_channels': 32}, 'at least 2 stages'), ({'alpha': 2.0}, r'alpha must lie in \[0, 1\]')],
)
def test_byot_refusals(digits, tmp_path, head, message):
    cfg = byot_config(digits, tmp_path)
    cfg.model.head.update(head)
    with pytest.raises(ValueError, match=message):
        MODELS.build(cfg.model)


# DDGSD

DDGSD = dict(type='selfkd_mmpretrain.DDGSDHook', temperature=2.0, weight=1.5, mmd_weight=0.5)


def two_views(cfg):
    crop = dict(type='RandomCrop', crop_size=8, padding=2)
    cfg.train_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), crop, dict(type='PackInputs')]
    return cfg


def test_ddgsd_recomputed(digits, tmp_path):
    """Each batch holds its images twice, differently cropped; both views are trained on and drawn together."""
    watch = Watch()
    train(two_views(digits_config(digits, tmp_path, DDGSD, **{'train_cfg.max_epochs': 1})), watch)
    differ = False
    for step in watch.steps:
        model = step['model'].train()
        data = model.data_preprocessor(step['batch'], True)
        paths = [sample.img_path for sample in data['data_samples']]
        assert len(paths) == 16
        assert paths[:8] == paths[8:]
        differ |= not torch.equal(data['inputs'][:8], data['inputs'][8:])
        features = model.extract_feat(data['inputs'])[-1]
        z, y = model.head.fc(features), target_of(data['data_samples'])
        a, b = z.div(2).log_softmax(1).chunk(2)
        kl = 4 * ((b.exp() * (b - a)).sum(1).mean() + (a.exp() * (a - b)).sum(1).mean())
        mmd = (features[:8].mean(0) - features[8:].mean(0)).square().sum()
        assert step['loss'] == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-4)
        assert step['loss_ddgsd'] == pytest.approx((1.5 * kl + 0.5 * mmd).item(), rel=1e-3, abs=1e-6)
    assert differ


def test_ddgsd_gradient_goes_into_the_taught_view_only():
    z, other = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    f = torch.zeros(2, 4)
    ddgsd_loss(z, other, f, f, weight=1.0, mmd_weight=0.0, temperature=1.0).backward()
    torch.testing.assert_close(z.grad, (z.softmax(1) - other.softmax(1)).detach() / 2)
    torch.testing.assert_close(other.grad, (other.softmax(1) - z.softmax(1)).detach() / 2)


@pytest.mark.parametrize(
    ('hooks', 'options', 'message'),
    [
        ([dict(DDGSD, temperature=0)], {}, 'temperature must be above 0'),
        ([DDGSD, dict(type='selfkd_mmpretrain.CSKDHook')], {}, 'use one of the two hooks'),
        (
            [DDGSD],
            {'data_preprocessor.batch_augments': dict(augments=dict(type='Mixup', alpha=0.2))},
            'remove batch_augments',
        ),
    ],
)
def test_ddgsd_refusals(digits, tmp_path, hooks, options, message):
    with pytest.raises(ValueError, match=message):
        train(digits_config(digits, tmp_path, *hooks, **options))


def test_ddgsd_in_an_iteration_based_loop(digits, tmp_path):
    with pytest.raises(ValueError, match="batch_sampler=dict.type='selfkd_mmengine.ViewBatchSampler'"):
        train(by_iterations(digits_config(digits, tmp_path / 'refused', DDGSD), 4))
    cfg = two_views(by_iterations(digits_config(digits, tmp_path / 'run', DDGSD), 4))
    cfg.train_dataloader.batch_sampler = ConfigDict(type='selfkd_mmengine.ViewBatchSampler')
    cfg.train_dataloader.sampler = ConfigDict(type='InfiniteSampler', shuffle=True)
    recorder = Recorder()
    train(cfg, recorder)
    assert all(step['loss_ddgsd'] > 0 for step in recorder.steps)


def test_two_processes(digits, tmp_path):
    """BYOT and DDGSD together under DDP: every parameter gets a gradient, and the ranks' weights stay one."""
    cfg = byot_config(digits, tmp_path / 'run', DDGSD, **{'train_cfg.max_epochs': 1})
    train_in_processes(cfg, tmp_path)
    assert (tmp_path / 'run/epoch_1.pth').exists()


# All three

COMPARATORS = {
    'TF-KD': lambda digits, work_dir, **options: digits_config(digits, work_dir, TFKD, **options),
    'BYOT': byot_config,
    'DDGSD': lambda digits, work_dir, **options: digits_config(digits, work_dir, DDGSD, **options),
}


@pytest.mark.parametrize('name', COMPARATORS)
def test_mixed_precision_and_accumulation(digits, tmp_path, name, monkeypatch):
    """AmpOptimWrapper refuses to be built without an accelerator, though its autocast supports the CPU."""
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    losses = []
    for amp in (False, True):
        cfg = COMPARATORS[name](digits, tmp_path / str(amp), **{'train_cfg.max_epochs': 1})
        cfg.optim_wrapper.accumulative_counts = 2
        if amp:
            cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
        runner = train(cfg, recorder := Recorder())
        assert recorder.steps[0]['logits'].dtype == (torch.bfloat16 if amp else torch.float32)
        assert all(torch.isfinite(p).all() for p in runner.model.parameters())
        losses.append({key: value for key, value in recorder.steps[0].items() if 'loss' in key})
    assert losses[0].keys() == losses[1].keys()
    for key, value in losses[0].items():  # the first step has the same weights
        assert losses[1][key] == pytest.approx(value, rel=0.05, abs=0.02), key
