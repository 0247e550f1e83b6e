"""FRSKD in real MMPretrain training runs."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from mm_runs import ROOT, Recorder, assert_same_state, digits_config, find_hook, train, train_in_processes
from mmengine.config import ConfigDict
from mmpretrain.registry import MODELS

from selfkd.losses import attention_transfer, hint_loss, overhaul_loss
from selfkd.publish import strip_self_teacher
from selfkd_mmpretrain.frskd_head import target_of

PSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)
PRE_RELU = {'model.backbone.type': 'PreReluResNet_CIFAR'}


def frskd_config(digits, work_dir, *hooks, head=(), **options):
    """The tiny digits config with FRSKDClsHead in place of pooling and LinearClsHead."""
    cfg = digits_config(digits, work_dir, *hooks, **options)
    cfg.model.backbone.out_indices = (0, 1, 2, 3)
    cfg.model.neck = None
    cfg.model.head = ConfigDict(
        type='selfkd_mmpretrain.FRSKDClsHead',
        num_classes=10,
        in_channels=[4, 8, 16, 32],
        loss=cfg.model.head.loss,
        **dict(head),
    )
    return cfg


def restated(model, batch, head):
    """The four terms of a step in the paper's words, on a copy of the model."""
    data = model.data_preprocessor(batch, True)
    feats = model.backbone(data['inputs'])
    y = target_of(data['data_samples'])
    z = model.head.fc(feats[-1].relu().mean((2, 3)))
    maps, t = model.head.self_teacher['pyramid'](feats, preact=head.get('feature_loss') == 'overhaul')
    p, log_q = F.softmax(t / 4, 1), F.log_softmax(z / 4, 1)
    kd = 16 * (p * (p.log() - log_q)).sum(1).mean()
    kind = head.get('feature_loss', 'attention')
    if kind == 'attention':
        terms = [attention_transfer(f.relu(), m) for f, m in zip(feats, maps)]
    else:
        adapted = [a(f) for a, f in zip(model.head.self_teacher['adapters'], feats)]
        loss, scale = (hint_loss, 1) if kind == 'hint' else (overhaul_loss, 2)
        terms = [loss(f, m) / scale ** (3 - i) for i, (f, m) in enumerate(zip(adapted, maps))]
    return {
        'loss_cls': F.cross_entropy(z, y),
        'loss_teacher': F.cross_entropy(t, y),
        'loss_kd': head.get('alpha', 2) * kd,
        'loss_feature': head.get('beta', 100) * sum(terms),
    }


@pytest.mark.parametrize(
    ('head', 'options'),
    [
        ({}, {}),
        ({'preact': True}, PRE_RELU),
        ({'feature_loss': 'hint', 'beta': 1.0, 'alpha': 3.0}, {}),
        ({'feature_loss': 'overhaul', 'beta': 1e-3, 'preact': True}, PRE_RELU),
        ({}, {'data_preprocessor.batch_augments': dict(augments=dict(type='Mixup', alpha=0.2))}),
        ({}, {'data_preprocessor.batch_augments': dict(augments=dict(type='CutMix', alpha=1.0))}),
    ],
)
def test_losses_recomputed(digits, tmp_path, head, options):
    """Every term of every step, from a copy of the model before it and the batch that it saw."""
    cfg = frskd_config(digits, tmp_path, head=head, **options, **{'train_cfg.max_epochs': 1})
    runner = train_and_watch(cfg)
    for before, batch, outputs in runner.watched:
        torch.manual_seed(0)
        import numpy as np

        np.random.seed(0)
        expected = restated(before.train(), batch, head)
        assert {k for k in outputs if k.startswith('loss_')} == set(expected)
        for name, value in expected.items():
            assert outputs[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
        assert outputs['loss'] == pytest.approx(
            sum(outputs[name] for name in expected), rel=1e-5
        )  # the sum is trained on


def train_and_watch(cfg):
    import numpy as np
    from mmengine.hooks import Hook

    class Watch(Hook):
        priority = 'VERY_LOW'

        def before_train(self, runner):
            runner.watched = []

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.now = (copy.deepcopy(runner.model), copy.deepcopy(data_batch))
            torch.manual_seed(0)  # Mixup draws in the preprocessor: the restatement draws the same
            np.random.seed(0)

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            runner.watched.append((*self.now, {k: float(v) for k, v in outputs.items()}))

    return train(cfg, Watch())


def test_with_weights_0_the_classifier_trains_as_in_vanilla_but_for_the_teachers_own_loss(digits, tmp_path):
    """Same names and numbers as backbone, pooling and LinearClsHead: loss and logits are bit-identical."""
    vanilla = MODELS.build(digits_config(digits, tmp_path).model)
    ours = MODELS.build(frskd_config(digits, tmp_path).model)
    vanilla.load_state_dict(strip_self_teacher(ours.state_dict()), strict=True)
    from mmpretrain.structures import DataSample

    x = torch.randn(6, 3, 8, 8)
    samples = [DataSample().set_gt_label(i) for i in range(6)]
    for mode in (True, False):
        vanilla.train(mode), ours.train(mode)
        assert torch.equal(vanilla(x), ours(x))
    vanilla.train(True), ours.train(True)
    losses = ours(x, samples, mode='loss')
    assert torch.equal(losses['loss_cls'], vanilla(x, samples, mode='loss')['loss'])


def test_sla_recomputed(digits, tmp_path):
    """Joint labels of class and rotation on both branches, in a pass of their own; the plain and the rotated images
    together give the KL and the attention transfer, as released."""
    cfg = frskd_config(digits, tmp_path, head={'sla': 0.5}, **{'train_cfg.max_epochs': 1})
    cfg.model.type = 'selfkd_mmpretrain.SLAImageClassifier'
    for model, batch, outputs in train_and_watch(cfg).watched:
        data, head = model.train().data_preprocessor(batch, True), model.head
        y, images, n = target_of(data['data_samples']), data['inputs'], 8

        def kl(student, teacher):
            p, log_q = F.softmax(teacher / 4, 1), F.log_softmax(student / 4, 1)
            return 16 * (p * (p.log() - log_q)).sum(1).mean()

        turned = torch.cat([torch.stack([image.rot90(k, (1, 2)) for k in range(4)]) for image in images])
        plain, rotated = model.backbone(images), model.backbone(turned)
        maps, t = head.self_teacher['pyramid'](plain)
        maps_rotated, _ = head.self_teacher['pyramid'](rotated)
        z = head.fc(plain[-1].mean((2, 3)))
        joint = head.self_teacher['joint'](rotated[-1].mean((2, 3)))
        joint_t = head.self_teacher['teacher_joint'](maps_rotated[-1].mean((2, 3)))
        labels = torch.tensor([4 * c + k for c in y.tolist() for k in range(4)])
        means = [
            torch.stack([sum(j[4 * i + k, k::4] for k in range(4)) / 4 for i in range(n)]) for j in (joint, joint_t)
        ]
        at = [
            attention_transfer(torch.cat([f, g]), torch.cat([m, r]))
            for f, g, m, r in zip(plain, rotated, maps, maps_rotated)
        ]
        expected = {
            'loss_cls': F.cross_entropy(z, y),
            'loss_teacher': F.cross_entropy(t, y),
            'loss_joint': F.cross_entropy(joint, labels) + F.cross_entropy(joint_t, labels),
            'loss_sla': 0.5 * (kl(z, means[0]) + kl(t, means[1])),
            'loss_kd': 2 * kl(torch.cat([z, means[0]]), torch.cat([t, means[1]])),
            'loss_feature': 100 * sum(at),
        }
        for name, value in expected.items():
            assert outputs[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
        assert outputs['loss'] == pytest.approx(sum(outputs[name] for name in expected), rel=1e-5)


def test_sla_and_the_model_type_belong_together(digits, tmp_path):
    cfg = frskd_config(digits, tmp_path, head={'sla': 1.0})
    with pytest.raises(ValueError, match="with sla set model.type='selfkd_mmpretrain.SLAImageClassifier'"):
        train(cfg)
    cfg = frskd_config(digits, tmp_path)
    cfg.model.type = 'selfkd_mmpretrain.SLAImageClassifier'
    with pytest.raises(ValueError, match='sla and the model type belong together'):
        train(cfg)
    cfg = frskd_config(digits, tmp_path, head={'sla': 1.0})
    cfg.model.type = 'selfkd_mmpretrain.SLAImageClassifier'
    cfg.data_preprocessor.batch_augments = dict(augments=dict(type='Mixup', alpha=0.2))
    with pytest.raises(ValueError, match='sla needs class ids'):
        train(cfg)


def test_soft_labels_only(digits, tmp_path):
    runner = train_and_watch(frskd_config(digits, tmp_path, head={'beta': 0.0}, **{'train_cfg.max_epochs': 1}))
    assert {k for k in runner.watched[0][2] if k.startswith('loss_')} == {'loss_cls', 'loss_teacher', 'loss_kd'}


def test_published_checkpoint_is_the_vanilla_model(digits, tmp_path):
    """Strict load, bit-identical predictions, plain tensors, and the self-teacher never runs at inference."""
    cfg = frskd_config(
        digits, tmp_path / 'run', head={'feature_loss': 'hint', 'beta': 1.0}, **{'train_cfg.max_epochs': 1}
    )
    model = train(cfg).model.eval()
    source, out = next((tmp_path / 'run').glob('epoch_1.pth')), tmp_path / 'published.pth'
    command = [sys.executable, str(ROOT / 'tools/publish_model.py'), str(source), str(out)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert 'of the self-teacher' in outcome.stdout
    vanilla = MODELS.build(digits_config(digits, tmp_path).model).eval()
    vanilla.load_state_dict(torch.load(out, weights_only=True)['state_dict'], strict=True)
    x = torch.randn(5, 3, 8, 8)
    model.head.self_teacher['pyramid'].register_forward_hook(
        lambda *_: pytest.fail('the self-teacher ran at inference')
    )
    for ours, theirs in zip(model(x, mode='predict'), vanilla(x, mode='predict')):
        assert torch.equal(ours.pred_score, theirs.pred_score)


def test_onnx_export_holds_the_vanilla_path_only(digits, tmp_path):
    from onnx.reference import ReferenceEvaluator

    model = MODELS.build(frskd_config(digits, tmp_path).model)
    model.eval()
    x, path = torch.randn(1, 3, 8, 8), str(tmp_path / 'model.onnx')
    torch.onnx.export(model, x, path, input_names=['images'])
    network = ReferenceEvaluator(path)
    torch.testing.assert_close(
        torch.from_numpy(network.run(None, {'images': x.numpy()})[0]), model(x), rtol=1e-4, atol=1e-5
    )
    assert not [node.name for node in network.proto_.graph.initializer if 'self_teacher' in node.name]


@pytest.mark.parametrize('label_smooth', [False, True])
@pytest.mark.parametrize('mixing', [None, 'Mixup', 'CutMix'])
def test_beside_pskd(digits, tmp_path, label_smooth, mixing):
    """PS-KD changes the classifier's cross-entropy only; with Mixup or CutMix its teacher is the snapshot."""
    options = {'data_preprocessor.batch_augments': dict(augments=dict(type=mixing, alpha=0.2))} if mixing else {}
    if label_smooth:
        options['model.head.loss'] = dict(type='LabelSmoothLoss', label_smooth_val=0.1)
    hook = dict(PSKD, teacher='snapshot') if mixing else PSKD
    recorder = Recorder()
    runner = train(frskd_config(digits, tmp_path, hook, **options), recorder)
    last = recorder.steps[-1]
    assert last['loss_cls'] == pytest.approx(last['pskd_hard'] + last['pskd_soft'], rel=1e-5)
    assert last['pskd_hard'] == pytest.approx(0.2 * last['plain'].item(), rel=1e-5)
    assert last['pskd_soft'] > 0
    if not mixing:  # the bank holds the classifier's predictions, not the self-teacher's
        bank = find_hook(runner, 'PSKDHook').bank
        infos = map(runner.train_dataloader.dataset.get_data_info, range(40))
        rows = {info['img_path']: i for i, info in enumerate(infos)}
        torch.testing.assert_close(bank.read(torch.tensor([rows[p] for p in last['paths']])), last['logits'].softmax(1))


def test_beside_cskd(digits, tmp_path):
    recorder = Recorder()
    train(frskd_config(digits, tmp_path, dict(type='selfkd_mmpretrain.CSKDHook')), recorder)
    assert recorder.steps[-1]['loss_cskd'] > 0


def test_resume_is_exact(digits, tmp_path):
    def config(name, **options):
        cfg = frskd_config(digits, tmp_path / name, **options, **{'default_hooks.checkpoint.max_keep_ckpts': 5})
        cfg.train_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
        return cfg

    straight = train(config('straight')).model.state_dict()
    resumed = train(config('resumed', resume=True, load_from=str(tmp_path / 'straight/epoch_2.pth')))
    assert_same_state(resumed.model.state_dict(), straight)


def test_mixed_precision_and_accumulation(digits, tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    cfg = frskd_config(digits, tmp_path)
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0, accumulative_counts=2)
    recorder = Recorder()
    runner = train(cfg, recorder)
    assert recorder.steps[0]['logits'].dtype == torch.bfloat16
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    assert all(recorder.steps[-1][k] > 0 for k in ('loss_cls', 'loss_teacher', 'loss_kd', 'loss_feature'))


def test_two_processes_find_a_gradient_for_every_parameter(digits, tmp_path):
    cfg = frskd_config(digits, tmp_path / 'run', **{'train_cfg.max_epochs': 1})
    train_in_processes(cfg, tmp_path)
    assert (tmp_path / 'run/epoch_1.pth').exists()


@pytest.mark.parametrize(
    ('head', 'message'),
    [
        ({'in_channels': 32}, 'in_channels must list the channels of at least 2 stages, got 32'),
        ({'feature_loss': 'at'}, "feature_loss must be one of .* got 'at'"),
        ({'alpha': -1.0}, 'FRSKDClsHead: alpha must be at least 0, got -1.0'),
        ({'in_channels': [4, 8, 16, 16]}, r'feats: channels must be in_channels=\[4, 8, 16, 16\]'),
    ],
)
def test_settings_that_cannot_work_are_refused(digits, tmp_path, head, message):
    from mmpretrain.structures import DataSample

    cfg = frskd_config(digits, tmp_path)
    cfg.model.head.update(head)

    def run():
        model = MODELS.build(cfg.model)
        model.head.fc = torch.nn.Linear(32, 10)
        model(torch.randn(2, 3, 8, 8), [DataSample().set_gt_label(0)] * 2, mode='loss')

    with pytest.raises(ValueError, match=message):
        run()


def test_a_pooling_neck_is_refused(digits, tmp_path):
    cfg = frskd_config(digits, tmp_path)
    cfg.model.neck = dict(type='GlobalAveragePooling')
    with pytest.raises(ValueError, match=r'needs feature maps .* set model.neck=None'):
        train(cfg)
