"""FRSKD in real MMPretrain training runs."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from helpers.mmengine import Recorder, assert_same_state, digits_config, find_hook, train
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmpretrain import ImageClassificationInferencer, get_model
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from selfkd.losses import attention_transfer, hint_loss, overhaul_loss
from selfkd.publish import publish_checkpoint, strip_self_teacher
from selfkd.pyramid import SelfTeacherPyramid
from selfkd_mmpretrain.heads import target_of
from selfkd_mmpretrain.stages import as_map

PSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)
MIXUP = {'data_preprocessor.batch_augments': dict(augments=dict(type='Mixup', alpha=0.2))}
CUTMIX = {'data_preprocessor.batch_augments': dict(augments=dict(type='CutMix', alpha=1.0))}


def frskd_config(digits, work_dir, *hooks, teacher=(), **options):
    """The tiny digits config with one setting changed."""
    cfg = digits_config(digits, work_dir, *hooks, **options)
    cfg.model.type = 'selfkd_mmpretrain.FRSKDImageClassifier'
    if teacher:
        cfg.model.self_teacher = ConfigDict(teacher)
    return cfg


def stage_maps(backbone, inputs, preact=False):
    """What ResNet's four stages give, by hand; with ``preact`` their sums before the last ReLU."""
    x, maps = backbone.relu(backbone.norm1(backbone.conv1(inputs))), []
    for name in backbone.res_layers:
        blocks = getattr(backbone, name)
        for block in blocks:
            shortcut = x if block.downsample is None else block.downsample(x)
            out = block.norm2(block.conv2(F.relu(block.norm1(block.conv1(x)))))
            x = F.relu(out + shortcut)
        maps.append(out + shortcut if preact else x)
    return maps


def restated(model, batch, teacher):
    """The four terms of a step in the paper's words, on a copy of the model."""
    data = model.data_preprocessor(batch, True)
    kind = teacher.get('feature_loss', 'attention')
    feats = stage_maps(model.backbone, data['inputs'], preact=kind == 'overhaul')
    y = target_of(data['data_samples'])
    z = model.head.fc(feats[-1].relu().mean((2, 3)))
    maps, t = model.self_teacher.pyramid(feats, preact=kind == 'overhaul')
    p, log_q = F.softmax(t / 4, 1), F.log_softmax(z / 4, 1)
    kd = 16 * (p * (p.log() - log_q)).sum(1).mean()
    if kind == 'attention':
        terms = [attention_transfer(f, m) for f, m in zip(feats, maps)]
    else:
        adapted = [a(f) for a, f in zip(model.self_teacher.adapters, feats)]
        loss, scale = (hint_loss, 1) if kind == 'hint' else (overhaul_loss, 2)
        terms = [loss(f, m) / scale ** (3 - i) for i, (f, m) in enumerate(zip(adapted, maps))]
    return {
        'loss_cls': F.cross_entropy(z, y),
        'loss_teacher': F.cross_entropy(t, y),
        'loss_kd': teacher.get('alpha', 2) * kd,
        'loss_feature': teacher.get('beta', 100) * sum(terms),
    }


@pytest.mark.parametrize(
    ('teacher', 'options'),
    [
        ({}, {}),
        ({'feature_loss': 'hint', 'beta': 1.0, 'alpha': 3.0}, {}),
        ({'feature_loss': 'overhaul', 'beta': 1e-3}, {}),
        ({}, MIXUP),
        ({}, CUTMIX),
    ],
)
def test_losses_recomputed(digits, tmp_path, teacher, options):
    """Every term of every step, from a copy of the model before it and the batch that it saw."""
    runner = train_and_watch(frskd_config(digits, tmp_path, teacher=teacher, **options, **{'train_cfg.max_epochs': 1}))
    for before, batch, outputs in runner.watched:
        torch.manual_seed(0)
        np.random.seed(0)
        expected = restated(before.train(), batch, teacher)
        assert {k for k in outputs if k.startswith('loss_')} == set(expected)
        for name, value in expected.items():
            assert outputs[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-4), name
        # the sum is trained on
        assert outputs['loss'] == pytest.approx(sum(outputs[name] for name in expected), rel=1e-5)


def train_and_watch(cfg):
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


def test_the_classifier_is_the_configs_own(digits, tmp_path):
    """Same names, same first weights at the same seed, and loss and logits are bit-identical."""
    torch.manual_seed(7)
    vanilla = MODELS.build(digits_config(digits, tmp_path).model)
    vanilla.init_weights()
    torch.manual_seed(7)
    ours = MODELS.build(frskd_config(digits, tmp_path).model)
    ours.init_weights()
    assert_same_state(strip_self_teacher(ours.state_dict()), dict(vanilla.state_dict()))
    x, samples = torch.randn(6, 3, 8, 8), [DataSample().set_gt_label(i) for i in range(6)]
    for mode in (True, False):
        vanilla.train(mode), ours.train(mode)
        assert torch.equal(vanilla(x), ours(x))
    vanilla.train(True), ours.train(True)
    losses = ours(x, samples, mode='loss')
    assert torch.equal(losses['loss_cls'], vanilla(x, samples, mode='loss')['loss'])


@pytest.mark.parametrize('whole_model', [False, True])
def test_the_self_teacher_keeps_torchs_initialisation(digits, tmp_path, whole_model):
    """LinearClsHead's own init_cfg (normal, 0.01) and a model's (Swin's) redraw every linear layer that they reach."""
    options = {'model.init_cfg': [dict(type='Constant', layer='Linear', val=5.0)]} if whole_model else {}
    model = MODELS.build(frskd_config(digits, tmp_path, teacher={'sla': 1.0, 'feature_loss': 'hint'}, **options).model)
    before = {name: p.clone() for name, p in model.self_teacher.state_dict().items()}
    head = model.head.fc.weight.clone()
    model.init_weights()
    assert not torch.equal(model.head.fc.weight, head)
    assert_same_state(dict(model.self_teacher.state_dict()), before)
    for linear in (model.self_teacher.pyramid.fc, model.self_teacher.joint, model.self_teacher.teacher_joint):
        bound = linear.in_features**-0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound


def test_building_it_changes_no_state(digits, tmp_path):
    """The look at the network leaves statistics, modes and torch's random state as they were."""
    vanilla = digits_config(digits, tmp_path).model
    torch.manual_seed(3)
    plain = MODELS.build(vanilla)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    model = MODELS.build(frskd_config(digits, tmp_path).model)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_state(strip_self_teacher(model.state_dict()), dict(plain.state_dict()))
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


GAP = dict(type='GlobalAveragePooling')
TRUNC_NORMAL = [dict(type='TruncNormal', layer='Linear', std=0.02)]  # as Swin's and ConvNeXt's configs
RELEASED = {
    'resnet18-cifar_1xb128-200e_cifar100': ([64, 128, 256, 512], ['layer1', 'layer2', 'layer3', 'layer4']),
    'wrn16-2_1xb128-200e_cifar100': ([32, 64, 128], ['stages.0', 'stages.1', 'stages.2']),
    'resnet18_1xb256-90e_imagenet': ([64, 128, 256, 512], ['layer1', 'layer2', 'layer3', 'layer4']),
    'resnet34_1xb256-90e_imagenet': ([64, 128, 256, 512], ['layer1', 'layer2', 'layer3', 'layer4']),
}


@pytest.mark.parametrize('name', RELEASED)
def test_the_released_networks_have_the_released_levels(name):
    model = MODELS.build(Config.fromfile(ROOT / f'configs/mmpretrain/frskd/{name}_frskd.py').model)
    channels, modules = RELEASED[name]
    assert model.self_teacher.pyramid.in_channels == channels
    assert [stage.module for stage in model._stages] == modules
    teachers = sum(p.numel() for p in model.self_teacher.pyramid.parameters())
    assert teachers == sum(p.numel() for p in SelfTeacherPyramid(channels, model.head.num_classes).parameters())


def test_sums_before_relu_of_wrn_are_what_the_self_teacher_sees():
    """A WRN stage ends in a batch norm; FRSKD's maps are its sums after ReLU, the overhaul variant's the sums."""
    backbone = dict(type='selfkd_mmpretrain.WideResNet_CIFAR', depth=10, widen_factor=1)
    head = dict(type='LinearClsHead', num_classes=3, in_channels=64)
    cfg = dict(type='selfkd_mmpretrain.FRSKDImageClassifier', backbone=backbone, neck=GAP, head=head)
    for kind in ('attention', 'overhaul'):
        model = MODELS.build(dict(cfg, self_teacher=dict(feature_loss=kind)))
        seen = []
        model.self_teacher.pyramid.register_forward_pre_hook(lambda m, args, seen=seen: seen.extend(args[0]))
        x = torch.randn(2, 3, 8, 8)
        model(x, [DataSample().set_gt_label(0)] * 2, mode='loss')
        sums = model.backbone.conv1(x)
        assert len(seen) == 3
        for got, stage in zip(seen, model.backbone.stages):
            sums = stage(sums)
            torch.testing.assert_close(got, sums if kind == 'overhaul' else sums.relu())


# One of each kind of network, small: its own neck and head, and norms, tokens, several outputs, pooling inside.
ZOO = {
    'ResNet': (
        dict(type='ResNet', depth=18, base_channels=8, stem_channels=8),
        GAP,
        dict(type='LinearClsHead', in_channels=64),
        [8, 16, 32, 64],
    ),
    'MobileNetV3': (
        dict(type='MobileNetV3', arch='small'),
        GAP,
        dict(type='StackedLinearClsHead', in_channels=576, mid_channels=[32], act_cfg=dict(type='HSwish')),
        [16, 24, 48, 576],
    ),
    'HRNet': (
        dict(type='HRNet', arch='w18'),
        [dict(type='HRFuseScales', in_channels=(18, 36, 72, 144)), GAP],
        dict(type='LinearClsHead', in_channels=2048),
        [18, 36, 72, 144],
    ),
    'Swin': (
        dict(
            type='SwinTransformer',
            arch=dict(embed_dims=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8]),
            window_size=2,
        ),
        GAP,
        dict(type='LinearClsHead', in_channels=64),
        [8, 16, 32, 64],
    ),
    'ConvNeXt': (
        dict(type='ConvNeXt', arch=dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32])),
        None,
        dict(type='LinearClsHead', in_channels=32),
        [8, 16, 24, 32],
    ),
}


@pytest.mark.parametrize('name', ZOO)
def test_networks_keep_their_own_neck_and_head(name, digits, tmp_path):
    """Two steps of a config with nothing changed but its type: all four losses, a gradient for every parameter, and a
    checkpoint that is the plain one and ``self_teacher.*``."""
    backbone, neck, head, channels = ZOO[name]
    plain = dict(type='ImageClassifier', backbone=backbone, neck=neck, head=dict(head, num_classes=10))
    cfg = digits_config(digits, tmp_path)
    cfg.model = ConfigDict(plain, type='selfkd_mmpretrain.FRSKDImageClassifier', init_cfg=TRUNC_NORMAL)
    resize = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=64), dict(type='PackInputs')]
    cfg.train_dataloader.dataset.pipeline = resize
    cfg.train_dataloader.dataset.indices = 8
    cfg.train_dataloader.batch_size = 4
    cfg.optim_wrapper.optimizer.lr = 1e-3
    cfg.train_cfg.max_epochs = 1
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = train(cfg, recorder := Recorder())
    for step in recorder.steps:
        assert all(step[f'loss_{part}'] > 0 for part in ('cls', 'teacher', 'kd', 'feature'))
    assert runner.model.self_teacher.pyramid.in_channels == channels
    vanilla = MODELS.build(plain)
    saved = torch.load(tmp_path / 'epoch_1.pth')['state_dict']
    vanilla.load_state_dict(strip_self_teacher(saved), strict=True)
    x = torch.randn(2, 3, 64, 64)
    vanilla.eval(), runner.model.eval()
    assert torch.equal(vanilla(x), runner.model(x))
    losses = runner.model.train()(inputs=x, data_samples=[DataSample().set_gt_label(i) for i in range(2)], mode='loss')
    sum(value for key, value in losses.items() if 'loss' in key).backward()
    assert not [name for name, p in runner.model.named_parameters() if p.grad is None]


def test_sla_recomputed(digits, tmp_path):
    """Joint labels of class and rotation on both branches, in a pass of their own; the plain and the rotated images
    together give the KL and the attention transfer, as released."""
    cfg = frskd_config(digits, tmp_path, teacher={'sla': 0.5}, **{'train_cfg.max_epochs': 1})
    for model, batch, outputs in train_and_watch(cfg).watched:
        data, teacher = model.train().data_preprocessor(batch, True), model.self_teacher
        y, images, n = target_of(data['data_samples']), data['inputs'], 8

        def kl(student, teacher):
            p, log_q = F.softmax(teacher / 4, 1), F.log_softmax(student / 4, 1)
            return 16 * (p * (p.log() - log_q)).sum(1).mean()

        turned = torch.cat([torch.stack([image.rot90(k, (1, 2)) for k in range(4)]) for image in images])
        plain, rotated = stage_maps(model.backbone, images), stage_maps(model.backbone, turned)
        maps, t = teacher.pyramid(plain)
        maps_rotated, _ = teacher.pyramid(rotated)
        z = model.head.fc(plain[-1].mean((2, 3)))
        joint = teacher.joint(rotated[-1].mean((2, 3)))
        joint_t = teacher.teacher_joint(maps_rotated[-1].mean((2, 3)))
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


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (MIXUP, r'self_teacher.sla needs class ids \(without Mixup'),
        ({'train_dataloader.dataset.pipeline': 'oblong'}, r'and square images, got \(8, 12\)'),
    ],
)
def test_sla_refusals(digits, tmp_path, options, message):
    cfg = frskd_config(digits, tmp_path, teacher={'sla': 1.0})
    if 'oblong' in options.values():
        resize = dict(type='Resize', scale=(12, 8))
        cfg.train_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), resize, dict(type='PackInputs')]
    else:
        cfg.merge_from_dict(options)
    with pytest.raises(ValueError, match=message):
        train(cfg)


def test_soft_labels_only(digits, tmp_path):
    runner = train_and_watch(frskd_config(digits, tmp_path, teacher={'beta': 0.0}, **{'train_cfg.max_epochs': 1}))
    assert {k for k in runner.watched[0][2] if k.startswith('loss_')} == {'loss_cls', 'loss_teacher', 'loss_kd'}


def test_published_checkpoint_is_the_vanilla_model(digits, tmp_path):
    """Strict load, bit-identical predictions, plain tensors, and the self-teacher never runs at inference."""
    cfg = frskd_config(
        digits, tmp_path / 'run', teacher={'feature_loss': 'hint', 'beta': 1.0}, **{'train_cfg.max_epochs': 1}
    )
    model = train(cfg).model.eval()
    source, out = next((tmp_path / 'run').glob('epoch_1.pth')), tmp_path / 'published.pth'
    command = [sys.executable, str(ROOT / 'tools/publish_model.py'), str(source), str(out)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert 'that are for training only' in outcome.stdout
    vanilla = MODELS.build(digits_config(digits, tmp_path).model).eval()
    vanilla.load_state_dict(torch.load(out, weights_only=True)['state_dict'], strict=True)
    x = torch.randn(5, 3, 8, 8)
    model.self_teacher.pyramid.register_forward_hook(lambda *_: pytest.fail('the self-teacher ran at inference'))
    for ours, theirs in zip(model(x, mode='predict'), vanilla(x, mode='predict')):
        assert torch.equal(ours.pred_score, theirs.pred_score)


def test_onnx_export_holds_the_vanilla_path_only(digits, tmp_path):
    reference = pytest.importorskip('onnx.reference', reason='onnx is not installed')
    model = MODELS.build(frskd_config(digits, tmp_path).model)
    model.eval()
    x, path = torch.randn(1, 3, 8, 8), str(tmp_path / 'model.onnx')
    torch.onnx.export(model, x, path, input_names=['images'])
    network = reference.ReferenceEvaluator(path)
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
        bank = find_hook(runner, 'PSKDHook').past.bank
        infos = map(runner.train_dataloader.dataset.get_data_info, range(40))
        rows = {info['img_path']: i for i, info in enumerate(infos)}
        torch.testing.assert_close(bank.read(torch.tensor([rows[p] for p in last['paths']])), last['logits'].softmax(1))


def test_beside_cskd(digits, tmp_path):
    recorder = Recorder()
    train(frskd_config(digits, tmp_path, dict(type='selfkd_mmpretrain.CSKDHook')), recorder)
    assert recorder.steps[-1]['loss_cskd'] > 0


@pytest.mark.parametrize(
    ('teacher', 'message'),
    [
        ({'feature_loss': 'at'}, "self_teacher: feature_loss must be one of .* got 'at'"),
        ({'alpha': -1.0}, 'self_teacher: alpha must be at least 0, got -1.0'),
        ({'temperature': 0}, 'self_teacher: temperature must be above 0, got 0'),
        ({'stages': ['layer2', 'layer9']}, r"stages must list modules of ResNet_CIFAR, of which \['layer9'\] is none"),
        ({'stages': 'layer2'}, "of which 'layer2' is none"),
        ({'stages': ['layer1.0', 'layer1']}, 'ResNet_CIFAR gives feature maps of one size only, 64 x 64, '),
    ],
)
def test_settings_that_cannot_work_are_refused(digits, tmp_path, teacher, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(frskd_config(digits, tmp_path, teacher=teacher).model)


def test_chosen_stages(digits, tmp_path):
    model = MODELS.build(frskd_config(digits, tmp_path, teacher={'stages': ['layer3', 'layer4.1']}).model)
    assert model.self_teacher.pyramid.in_channels == [16, 32]


VIT = dict(type='VisionTransformer', arch='deit-t', img_size=32, patch_size=16)
VIT_HEAD = dict(type='VisionTransformerClsHead', num_classes=10, in_channels=192)
CONVMIXER_HEAD = dict(type='LinearClsHead', num_classes=10, in_channels=768)
LENET = dict(backbone=dict(type='LeNet5', num_classes=10), neck=None, head=dict(type='ClsHead'))
ARCFACE = dict(type='ArcFaceClsHead', num_classes=10, in_channels=32)
FOCAL = dict(type='LinearClsHead', num_classes=10, in_channels=32, loss=dict(type='FocalLoss'))


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (
            dict(backbone=VIT, neck=None, head=VIT_HEAD),
            r'VisionTransformer gives feature maps of one size only, 2 x 2, .* use PSKDHook',
        ),
        (dict(head=ARCFACE), 'FRSKDImageClassifier: ArcFaceClsHead trains on logits with a margin'),
        (dict(head=FOCAL), 'FRSKDImageClassifier: LinearClsHead trains with FocalLoss'),
        (dict(head=None), 'ImageClassifier with the head NoneType has no loss_module of a classification'),
        (
            dict(loss=None),
            r"stands for an ImageClassifier, whose settings are .* got \['loss'\]: the config is of another",
        ),
        (dict(alpha=2), 'alpha: the settings of the method belong to self_teacher, so write model.self_teacher.alpha'),
        (dict(self_teacher=dict(alhpa=2)), r"self_teacher has no setting alhpa, but \['base_type', 'stages', 'alpha'"),
        (
            dict(backbone=dict(type='ConvMixer', arch='768/32'), head=CONVMIXER_HEAD),
            'ConvMixer gives feature maps of one size',
        ),
        (LENET, 'LeNet5 gives no feature maps'),
        (dict(head=dict(type='LinearClsHead', num_classes=10, in_channels=33)), r'ResNet_CIFAR fails on an image of'),
    ],
)
def test_models_that_cannot_work_are_refused(digits, tmp_path, model, message):
    cfg = frskd_config(digits, tmp_path)
    cfg.model = ConfigDict({**cfg.model, **model})
    with pytest.raises(ValueError, match=message):
        MODELS.build(cfg.model)


def test_stages_that_must_be_named(digits, tmp_path):
    """Those of LeNet lie in a sequence, and its images are smaller than others'."""
    cfg = frskd_config(digits, tmp_path, teacher={'stages': ['features.2', 'features.5']})
    cfg.model = ConfigDict({**cfg.model, **LENET})
    assert MODELS.build(cfg.model).self_teacher.pyramid.in_channels == [6, 16]


def test_tokens_of_tokens_are_a_map():
    """HiViT's: each place of a coarse map holds a small map."""
    x = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    patches = x.unflatten(3, (6, 2)).unflatten(2, (4, 2)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2)
    assert patches.shape == (2, 24, 2, 2, 3)
    assert torch.equal(as_map(patches, (64, 96)), x)


def test_a_timm_classifier_is_refused():
    with pytest.raises(ValueError, match=r"got \['model_name'\]: .* the backbone TIMMBackbone"):
        MODELS.build(dict(type='selfkd_mmpretrain.FRSKDImageClassifier', model_name='resnet18'))


def test_self_supervision_is_refused():
    """Its head and preprocessor are others, its settings have the same names."""
    cfg = get_config('mmpretrain::barlowtwins/barlowtwins_resnet50_8xb256-coslr-300e_in1k.py')
    cfg.model.update(type='selfkd_mmpretrain.FRSKDImageClassifier', data_preprocessor=cfg.data_preprocessor)
    with pytest.raises(
        ValueError, match='LatentCrossCorrelationHead does not classify images, so there is no class prediction'
    ):
        MODELS.build(cfg.model)


def test_the_toolkits_own_inference(digits, tmp_path):
    """get_model and the inferencer, on the training checkpoint and on the published one, give the same."""
    cfg = frskd_config(digits, tmp_path / 'run', **{'train_cfg.max_epochs': 1})
    train(cfg)
    publish_checkpoint(str(tmp_path / 'run/epoch_1.pth'), str(tmp_path / 'published.pth'))
    image = str(next((digits / 'test').rglob('*.png')))
    plain = digits_config(digits, tmp_path / 'run')
    results = []
    for config, name in ((cfg, 'run/epoch_1.pth'), (cfg, 'published.pth'), (plain, 'published.pth')):
        model = get_model(config, pretrained=str(tmp_path / name))
        results.append(ImageClassificationInferencer(model)(image)[0])
    assert (
        results[0]['pred_scores'].tolist() == results[1]['pred_scores'].tolist() == results[2]['pred_scores'].tolist()
    )


def test_one_option_on_the_command_line(digits, tmp_path):
    options = [f'{loader}_dataloader.dataset.data_root={digits}' for loader in ('train', 'val')]
    options += ['train_cfg.max_epochs=1', 'default_hooks.logger.interval=1', 'model.self_teacher.alpha=3']
    options += ['model.type=selfkd_mmpretrain.FRSKDImageClassifier']
    command = [sys.executable, str(ROOT / 'tools/train.py'), str(ROOT / 'configs/mmpretrain/_base_/digits.py')]
    command += ['--work-dir', str(tmp_path), '--cfg-options', *options]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert 'loss_teacher: ' in outcome.stdout + outcome.stderr


class OwnClassifier(ImageClassifier):
    """With a loss term of its own, and a setting for it."""

    def __init__(self, *args, own_weight=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.own_weight = own_weight

    def loss(self, inputs, data_samples):
        own = self.own_weight * self.head.fc.weight.abs().sum()
        return {**super().loss(inputs, data_samples), 'loss_own': own}


class TwoPasses(ImageClassifier):
    """Looks at the images twice."""

    def loss(self, inputs, data_samples):
        self.extract_feat(inputs.flip(3))
        return super().loss(inputs, data_samples)


@pytest.fixture
def own_classifier():
    MODELS.register_module(module=OwnClassifier)
    yield
    del MODELS.module_dict['OwnClassifier']


@pytest.mark.usefixtures('own_classifier')
def test_an_own_classifier_is_asked_for_and_keeps_its_loss(digits, tmp_path):
    message = "OwnClassifier. What .* lost .* set self_teacher.base_type .* 'OwnClassifier' or 'ImageClassifier'"
    with pytest.raises(ValueError, match=message):
        MODELS.build(frskd_config(digits, tmp_path).model)
    model = MODELS.build(frskd_config(digits, tmp_path, teacher=dict(base_type='ImageClassifier')).model)
    assert type(model).__name__ == 'FRSKDImageClassifier'
    with pytest.raises(ValueError, match='base_type must name ImageClassifier or a class made from it, got LinearCls'):
        MODELS.build(frskd_config(digits, tmp_path, teacher=dict(base_type='LinearClsHead')).model)
    cfg = frskd_config(digits, tmp_path, teacher=dict(base_type='OwnClassifier'), **{'train_cfg.max_epochs': 1})
    cfg.model.own_weight = 2.0
    runner = train_and_watch(cfg)
    assert isinstance(runner.model, OwnClassifier)
    for before, _, outputs in runner.watched:
        assert outputs['loss_own'] == pytest.approx(2 * before.head.fc.weight.abs().sum().item(), rel=1e-5)
        assert min(outputs['loss_kd'], outputs['loss_teacher'], outputs['loss_cls']) > 0
    plain = MODELS.build(dict(digits_config(digits, tmp_path).model, type='OwnClassifier'))
    plain.load_state_dict(strip_self_teacher(runner.model.state_dict()), strict=True)


def test_a_validation_loss_is_the_plain_one(digits, tmp_path):
    """In evaluation mode, or without gradients."""
    model = MODELS.build(frskd_config(digits, tmp_path).model)
    data = dict(inputs=torch.randn(2, 3, 8, 8), data_samples=[DataSample().set_gt_label(0)] * 2)
    assert set(model(**data, mode='loss')) == {'loss_cls', 'loss_teacher', 'loss_kd', 'loss_feature'}
    with torch.no_grad():
        assert set(model(**data, mode='loss')) == {'loss'}
    assert set(model.eval()(**data, mode='loss')) == {'loss'}


def test_maps_of_a_second_pass_are_not_taken_for_those_of_the_loss(digits, tmp_path):
    cfg = frskd_config(digits, tmp_path, teacher=dict(base_type=TwoPasses))
    with pytest.raises(RuntimeError, match='FRSKDImageClassifier: the backbone ran 2 times before the loss'):
        train(cfg)
