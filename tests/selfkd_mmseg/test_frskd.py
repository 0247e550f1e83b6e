"""FRSKD in real MMSegmentation training runs."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from helpers.mmengine import assert_same_state, train
from helpers.mmseg import BASES, MAPS, config, tiny
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn


def frskd_config(voc, work_dir, *hooks, teacher=(), **options):
    """The tiny FCN, auxiliary head included, with a self-teacher."""
    cfg = config(voc, work_dir, *hooks, **options)
    cfg.model.type = 'selfkd_mmseg.FRSKDEncoderDecoder'
    cfg.model.self_teacher = ConfigDict({'width': 8, 'channels': 8, 'warmup': 0.5, **dict(teacher)})
    return cfg


class Watch(Hook):
    """Keeps of each step a copy of the model before it, its batch, and what was logged."""

    def __init__(self):
        self.steps = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.now = (copy.deepcopy(runner.model), copy.deepcopy(data_batch))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps.append((*self.now, {k: float(v) for k, v in outputs.items() if v.numel() == 1}))


CASES = {
    'plain': ({}, {}),
    'avg_non_ignore': ({}, {'model.decode_head.loss_decode.avg_non_ignore': True}),
    'two losses, other weights': (
        {'alpha': 2.0, 'beta': 5.0},
        {
            'model.decode_head.loss_decode': [
                dict(type='DiceLoss', loss_name='loss_dice'),
                dict(type='CrossEntropyLoss', loss_name='loss_ce'),
            ]
        },
    ),
    'some maps': (
        {
            'in_index': [0, 1],
            'repeats': 1,
            'temperature': 2.0,
            'loss_decode': dict(type='CrossEntropyLoss', loss_weight=0.4),
        },
        {},
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_losses_recomputed(voc, tmp_path, case):
    """Every term of every step, from a copy of the model before it and the batch that it saw; 8 steps, 4 of warm-up."""
    teacher, options = CASES[case]
    cfg = frskd_config(voc, tmp_path, teacher=teacher, **options, **{'train_cfg.max_iters': 8})
    train(cfg, watch := Watch())
    assert len(watch.steps) == 8
    for i, (model, batch, logged) in enumerate(watch.steps):
        data = model.train().data_preprocessor(batch, True)
        label = torch.stack([s.gt_sem_seg.data[0] for s in data['data_samples']])
        feats = model.backbone(data['inputs'])
        chosen = [feats[k] for k in teacher.get('in_index', range(4))]
        maps = model.self_teacher.pyramid(chosen)
        student, self_teacher = (
            F.interpolate(z, (48, 48), mode='bilinear', align_corners=False).double()
            for z in (model.decode_head(feats), model.self_teacher.head(maps))
        )
        valid = label != 255
        assert valid.any()
        assert not valid.all()
        count = valid.sum() if case == 'avg_non_ignore' else valid.numel()
        t = teacher.get('temperature', 1.0)
        p, log_q = (self_teacher / t).softmax(1), (student / t).log_softmax(1)
        kl = t**2 * (p * (p.log() - log_q)).sum(1)[valid].sum() / count
        attention = 0
        for f, m in zip(chosen, maps):
            a, b = (F.normalize(x.double().pow(2).mean(1).flatten(1)) for x in (f, m))
            attention += (a - b).pow(2).mean()
        weight = 0 if i < 4 else torch.tensor(-5 * (1 - (i + 1 - 4) / 4) ** 2).exp().item()
        expected = {
            'decode.loss_ce': F.cross_entropy(student, label, ignore_index=255, reduction='sum') / count,
            'self_teacher.loss_ce': F.cross_entropy(self_teacher, label, ignore_index=255, reduction='sum') / count,
            'self_teacher.loss_kd': teacher.get('alpha', 1) * weight * kl,
            'self_teacher.loss_feature': teacher.get('beta', 50) * weight * attention,
        }
        expected['self_teacher.loss_ce'] *= 0.4 if case == 'some maps' else 1
        assert logged['self_teacher.ramp'] == pytest.approx(weight)
        for name, value in expected.items():
            assert logged[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), (i, name)
        assert logged['loss'] == pytest.approx(sum(v for k, v in logged.items() if '.loss' in k), rel=1e-5)
    assert 'aux.loss_ce' in logged  # the config's own auxiliary head
    assert logged['self_teacher.loss_kd'] > 0
    assert logged['self_teacher.loss_feature'] > 0


def step(cfg, label, size=48, seed=0):
    """The losses of one training step outside a Runner, and the model."""
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model).train()
    samples = [SegDataSample(gt_sem_seg=PixelData(data=each[None])) for each in label]
    return model(torch.randn(len(label), 3, size, size), samples, mode='loss'), model


def test_student_and_its_losses_are_the_vanilla_models(voc, tmp_path):
    """Same names and numbers: bit-identical losses and logits, and only the self-teacher's keys more."""
    cfg, label = frskd_config(voc, tmp_path), torch.randint(0, 11, (2, 48, 48))
    losses, ours = step(cfg, label)
    vanilla = MODELS.build(config(voc, tmp_path).model)
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith('self_teacher.')}
    vanilla.load_state_dict(state, strict=True)
    cfg = config(voc, tmp_path)
    torch.manual_seed(0)
    MODELS.build(frskd_config(voc, tmp_path).model)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=each[None])) for each in label]
    theirs = vanilla.train()(torch.randn(2, 3, 48, 48), samples, mode='loss')
    assert theirs.keys() == {k for k in losses if not k.startswith('self_teacher.')}
    for name, value in theirs.items():
        assert torch.equal(value, losses[name]), name


def test_a_validation_loss_is_the_plain_one(voc, tmp_path):
    """In evaluation mode, or without gradients."""
    label = torch.randint(0, 11, (2, 48, 48))
    losses, model = step(frskd_config(voc, tmp_path), label)
    plain = {name for name in losses if not name.startswith('self_teacher.')}
    assert plain < set(losses)
    data = [torch.randn(2, 3, 48, 48), [SegDataSample(gt_sem_seg=PixelData(data=each[None])) for each in label]]
    with torch.no_grad():
        assert set(model(*data, mode='loss')) == plain
    assert set(model.eval()(*data, mode='loss')) == plain


def test_the_self_teacher_has_the_decode_heads_settings_unless_given_others(voc, tmp_path):
    options = {
        'ignore_index': 3,
        'align_corners': True,
        'num_classes': 7,
        'sampler': dict(type='OHEMPixelSampler', thresh=0.7),
        'loss_decode': dict(type='CrossEntropyLoss', loss_name='loss_own', loss_weight=0.5),
    }
    options = {f'model.decode_head.{name}': value for name, value in options.items()}
    model = MODELS.build(frskd_config(voc, tmp_path, teacher={'align_corners': False}, **options).model)
    head = model.self_teacher.head
    assert (head.ignore_index, head.num_classes, head.loss_decode.loss_name, head.loss_decode.loss_weight) == (
        3,
        7,
        'loss_own',
        0.5,
    )
    assert head.sampler.thresh == 0.7
    assert head.align_corners is False
    assert model.decode_head.align_corners is True


def test_gradients_stop_where_they_should(voc, tmp_path):
    """What teaches is a constant; ignored pixels teach nothing; the self-teacher's own loss reaches the backbone."""
    label = torch.randint(0, 11, (2, 48, 48))
    label[0, :24] = 255
    losses, model = step(frskd_config(voc, tmp_path), label)
    students, teachers = list(model.backbone.parameters()), list(model.self_teacher.parameters())
    for name in ('loss_kd', 'loss_feature'):
        loss = losses[f'self_teacher.{name}']
        assert not any(g is not None for g in torch.autograd.grad(loss, teachers, retain_graph=True, allow_unused=True))
        assert any(g.abs().sum() > 0 for g in torch.autograd.grad(loss, students, retain_graph=True))
    grads = torch.autograd.grad(losses['self_teacher.loss_ce'], students + teachers, retain_graph=True)
    assert all(g is not None for g in grads)
    logits = torch.randn(2, 11, 48, 48, requires_grad=True)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=each[None])) for each in label]
    feats = model.backbone(torch.randn(2, 3, 48, 48))
    model.self_teacher.loss(feats, samples, logits, False)['loss_kd'].backward()
    assert not logits.grad[0, :, :24].any()
    assert (logits.grad[0, :, 24:].abs().sum(0) > 0).all()
    assert (logits.grad[1].abs().sum(0) > 0).all()


CE = dict(type='CrossEntropyLoss', loss_name='loss_ce', avg_non_ignore=True)
LOVASZ = dict(type='LovaszLoss', loss_name='loss_lovasz', per_image=True)


@pytest.mark.parametrize(
    'options',
    [
        {'model.decode_head.loss_decode': [LOVASZ, CE]},  # another softmax loss before it
        {'model.decode_head.sampler': dict(type='OHEMPixelSampler', min_kept=100)},  # which calls the losses itself
    ],
    ids=['Lovasz', 'OHEM without threshold'],
)
def test_the_kl_is_averaged_as_the_cross_entropy(voc, tmp_path, options):
    label = torch.randint(0, 11, (2, 48, 48))
    label[0, :24] = 255
    expected, _ = step(frskd_config(voc, tmp_path, **{'model.decode_head.loss_decode': CE}), label)
    losses, _ = step(frskd_config(voc, tmp_path, **{'model.decode_head.loss_decode': CE, **options}), label)
    assert losses['self_teacher.loss_kd'].item() == pytest.approx(expected['self_teacher.loss_kd'].item(), rel=1e-5)
    assert losses['self_teacher.loss_ce'] > 0


def test_in_a_loop_by_epoch_the_ramp_counts_epochs(voc, tmp_path):
    """Constant within an epoch; s is the share of the epochs after the warm-up, the present one included."""
    cfg = frskd_config(voc, tmp_path, teacher={'warmup': 1 / 3})
    cfg.train_cfg = dict(by_epoch=True, max_epochs=3)
    cfg.train_dataloader.sampler.type = 'DefaultSampler'
    cfg.default_hooks.checkpoint.by_epoch = True
    train(cfg, watch := Watch())
    ramps = [logged['self_teacher.ramp'] for _, _, logged in watch.steps]
    assert ramps == pytest.approx([0] * 4 + [torch.tensor(-5 / 4).exp().item()] * 4 + [1] * 4)


@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_all_ignored(voc, tmp_path, avg_non_ignore):
    options = {'model.decode_head.loss_decode.avg_non_ignore': avg_non_ignore}
    losses, model = step(frskd_config(voc, tmp_path, **options), torch.full((2, 48, 48), 255))
    assert losses['self_teacher.loss_kd'] == 0
    assert torch.isfinite(losses['self_teacher.loss_feature'])
    sum(v for k, v in losses.items() if '.loss' in k).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.backbone.parameters())


def test_published_checkpoint_is_the_vanilla_model(voc, tmp_path):
    """Strict load with the config's auxiliary head, bit-identical predictions when sliding, no self-teacher called."""
    options = {'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32)), 'train_cfg.max_iters': 2}
    runner = train(frskd_config(voc, tmp_path, **options))
    source, out = tmp_path / 'iter_2.pth', tmp_path / 'published.pth'
    command = [sys.executable, str(ROOT / 'tools/publish_model.py'), str(source), str(out)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    cfg = config(voc, tmp_path, **options)
    vanilla = MODELS.build(cfg.model).eval()
    vanilla.load_state_dict(torch.load(out, weights_only=True)['state_dict'], strict=True)
    batch = next(iter(runner.val_dataloader))
    model = runner.model.eval()
    model.self_teacher.forward = lambda *_: pytest.fail('the self-teacher ran at inference')
    with torch.no_grad():
        ours, theirs = model.test_step(batch)[0], vanilla.test_step(batch)[0]
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(model(x, mode='tensor'), vanilla(x, mode='tensor'))
    torch.testing.assert_close(ours.seg_logits.data, theirs.seg_logits.data, rtol=0, atol=0)


def test_training_goes_on_from_a_vanilla_checkpoint(voc, tmp_path):
    train(config(voc, tmp_path / 'vanilla', **{'train_cfg.max_iters': 1}))
    checkpoint = tmp_path / 'vanilla/iter_1.pth'
    options = {'train_cfg.max_iters': 1, 'optim_wrapper.optimizer.lr': 0.0, 'load_from': str(checkpoint)}
    started = train(frskd_config(voc, tmp_path / 'ours', teacher={'warmup': 0.0}, **options)).model.state_dict()
    for name, p in torch.load(checkpoint)['state_dict'].items():
        if 'running' not in name and 'num_batches' not in name:
            assert torch.equal(started[name], p), name


def test_resume_in_warm_up_is_exact(voc, tmp_path):
    straight = frskd_config(voc, tmp_path / 'straight')
    train(straight)
    resumed = frskd_config(voc, tmp_path / 'resumed')
    resumed.resume, resumed.load_from = True, str(tmp_path / 'straight/iter_2.pth')
    train(resumed)
    results = [torch.load(tmp_path / name / 'iter_7.pth') for name in ('straight', 'resumed')]
    for key in ('state_dict', 'optimizer'):
        assert_same_state(results[0][key], results[1][key])


def test_mixed_precision_and_accumulation(voc, tmp_path, monkeypatch):
    """bfloat16 forward passes, KL and attention transfer in float32; weights change at every second step only."""
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    cfg = frskd_config(voc, tmp_path, teacher={'warmup': 0.0}, **{'train_cfg.max_iters': 4})
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0, accumulative_counts=2)
    types = []

    class Types(Hook):
        def before_train(self, runner):
            runner.model.decode_head.register_forward_hook(lambda m, a, out: types.append(out.dtype))
            runner.model.self_teacher.head.conv.register_forward_hook(lambda m, a, out: types.append(out.dtype))
            forward = runner.model.self_teacher.loss

            def loss(*args):
                out = forward(*args)
                types.extend([out['loss_kd'].dtype, out['loss_feature'].dtype])
                return out

            runner.model.self_teacher.loss = loss

    runner = train(cfg, watch := Watch(), Types())
    assert set(types[::3]) == {torch.bfloat16}
    assert set(types[1::3] + types[2::3]) == {torch.float32}
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    weights = [model.decode_head.conv_seg.weight for model, _, _ in watch.steps]
    assert [torch.equal(a, b) for a, b in zip(weights, weights[1:])] == [True, False, True]


def test_beside_pskd(voc, tmp_path):
    """PS-KD changes the decode head's cross-entropy only; its past copy does not run the self-teacher."""
    hook = dict(type='selfkd_mmseg.PSKDHook', alpha=0.8, interval=3)
    train(frskd_config(voc, tmp_path, hook), watch := Watch())
    logged = watch.steps[-1][2]
    assert logged['decode.loss_ce'] == pytest.approx(logged['pskd_hard'] + logged['pskd_soft'], rel=1e-5)
    assert logged['pskd_soft'] > 0
    assert logged['self_teacher.loss_kd'] > 0


@pytest.mark.parametrize('base', BASES)
def test_heads(voc, tmp_path, base):
    """FRSKD and PS-KD together over MMSegmentation's own models: two steps in a Runner."""
    options = {'train_cfg.max_iters': 2, 'model.type': 'selfkd_mmseg.FRSKDEncoderDecoder'}
    options['model.self_teacher'] = dict(warmup=0.5)
    cfg = config(voc, tmp_path, dict(type='selfkd_mmseg.PSKDHook', interval=1), base=base, **options)
    runner = train(cfg, watch := Watch())
    logged = watch.steps[-1][2]
    assert logged['pskd_soft'] > 0
    assert logged['self_teacher.loss_kd'] > 0
    assert logged['self_teacher.loss_feature'] > 0
    assert ('aux.loss_ce' in logged) == ('auxiliary_head' in cfg.model)
    state = {k: v for k, v in runner.model.state_dict().items() if not k.startswith('self_teacher.')}
    MODELS.build(tiny(base)).load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ('teacher', 'options', 'message'),
    [
        (
            {'in_channels': [8, 16, 32, 32]},
            {},
            r'in_channels is \[8, 16, 32, 32\], but the feature maps .* have \[8, 16, 32, 64\] channels: leave',
        ),
        ({'in_channels': [8, 16]}, {}, r'have \[8, 16, 32, 64\] channels: leave in_channels out'),
        ({'in_channels': 64}, {}, 'in_channels must list those of 2 feature maps or more, got 64'),
        ({'in_channels': MAPS, 'in_index': [0, 1]}, {}, r'in_index must name 4 feature maps, got \[0, 1\]'),
        ({'in_index': [0, 4]}, {}, r'are .* \[\(8, 32, 32\), .* needs two of them or more; choose them by .*in_index'),
        ({'in_index': [1, 0]}, {}, r'several sizes, fine to coarse, but self_teacher.in_index=\[1, 0\] are not; name'),
        ({'in_index': [1, 2, 3]}, {}, r'several sizes, fine to coarse, but self_teacher.in_index=\[1, 2, 3\] are not'),
        ({'warmup': 0.9}, {}, r'warmup=0.9 of 7 iters ends with training, .* would never teach: .* to 0.857 or less'),
        ({'warmup': 1.0}, {}, r'warmup must lie in \[0, 1\), got 1.0'),
        ({'num_classes': 12}, {}, 'self_teacher.num_classes is 12, but the decode head has 11 classes'),
        (
            {},
            {'model.decode_head.loss_decode.use_sigmoid': True},
            r"FCNHead trains 11 outputs with \['CrossEntropyLoss'\], .* use_sigmoid=False",
        ),
        (
            {},
            {'model.decode_head.num_classes': 2, 'model.decode_head.out_channels': 1},
            'FCNHead trains 1 outputs .* decode_head.out_channels must be num_classes',
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(voc, tmp_path, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        train(frskd_config(voc, tmp_path, teacher=teacher, **options))


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        ({'decode_head': [dict(type='FCNHead')] * 2}, r'this model is CascadeEncoderDecoder \(it has a list of decode'),
        ({'num_stages': 2}, r"this model is CascadeEncoderDecoder \(it has the options \['num_stages'\]\)"),
        (
            {'image_encoder': {}, 'text_encoder': {}},
            'this model is MultimodalEncoderDecoder .*: leave model.type as it is',
        ),
        ({'temperature': 2}, r"this model is of another type \(it has the options \['temperature'\]\)"),
        ({'decode_head': dict(type='DAHead')}, 'DAHead is not supported .*computes its loss as BaseDecodeHead does'),
        (
            {'decode_head': dict(type='VPDDepthHead')},
            r'VPDDepthHead is not supported \(it is a head of DepthEstimator;',
        ),
        ({'decode_head': dict(type='SideAdapterCLIPHead')}, 'SideAdapterCLIPHead .* head of MultimodalEncoderDecoder'),
        (
            {'decode_head': dict(type='IterativeDecodeHead')},
            'IterativeDecodeHead is not supported .its kernels, as in K-Net, are refined',
        ),
        (
            {'decode_head': dict(type='Mask2FormerHead')},
            'Mask2FormerHead is not supported .it classifies the masks that its queries draw',
        ),
    ],
)
def test_what_is_no_encoder_decoder_is_refused_by_name(voc, tmp_path, model, message):
    """model.type replaces the type that the config had: what that was is known by what the rest of the config has."""
    cfg = frskd_config(voc, tmp_path)
    for key, value in model.items():
        cfg.model[key] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        MODELS.build(cfg.model)


@pytest.mark.parametrize('base', BASES)
def test_one_option(voc, tmp_path, base):
    """The self-teacher finds its channels by looking at the network, and leaves no trace of having looked."""
    cfg = config(voc, tmp_path, base=base)
    torch.manual_seed(0)
    vanilla = MODELS.build(cfg.model)
    modes = {name: module.training for name, module in vanilla.named_modules()}
    cfg.model.type = 'selfkd_mmseg.FRSKDEncoderDecoder'
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    assert model.self_teacher.in_channels == BASES[base]
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in vanilla.state_dict().items())
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    assert all(p.requires_grad for p in model.self_teacher.parameters())


UNET = dict(
    type='UNet', in_channels=3, base_channels=4, num_stages=3, strides=(1,) * 3, enc_num_convs=(1,) * 3,
    dec_num_convs=(1,) * 2, downsamples=(True,) * 2, enc_dilations=(1,) * 3, dec_dilations=(1,) * 2,
)  # fmt: skip
ERFNET = dict(type='ERFNet', enc_downsample_channels=(4, 8, 16), enc_stage_non_bottlenecks=(1, 1))
ERFNET.update(enc_non_bottleneck_dilations=(2,), dec_upsample_channels=(8, 4), dec_stages_non_bottleneck=(1, 1))
BISENET = dict(type='BiSeNetV2', detail_channels=(8, 8, 16), semantic_channels=(4, 8, 8, 16))
BISENET.update(bga_channels=16)
ONE_MAP = dict(type='ResNet', depth=18, base_channels=8, stem_channels=8, norm_cfg=dict(type='BN'), out_indices=(3,))


@pytest.mark.parametrize(
    ('backbone', 'head', 'channels', 'in_index'),
    [
        (UNET, (4, 2), [4, 8, 16], [2, 1, 0]),  # its decoder hands its maps over coarse to fine
        (BISENET, (16, 0), [4, 16, 8, 16], [1, 0, 3, 4]),  # of two maps of a size, the one that the decode head reads
        (ERFNET, (16, 0), [16, 64, 16], None),  # one map reaches the decode head, the others are inside
        (ONE_MAP, (64, 0), [8, 16, 32, 64], None),
    ],
)
def test_maps_are_found_by_their_sizes(voc, tmp_path, backbone, head, channels, in_index):
    cfg = config(voc, tmp_path)
    cfg.model.backbone = ConfigDict(backbone)
    cfg.model.update(type='selfkd_mmseg.FRSKDEncoderDecoder', auxiliary_head=None, self_teacher=dict(warmup=0.0))
    cfg.model.decode_head.update(in_channels=head[0], in_index=head[1])
    model = MODELS.build(cfg.model)
    assert (model.self_teacher.in_channels, model.self_teacher.in_index) == (channels, in_index)
    losses = model.train()(*batch_of(), mode='loss')
    assert losses['self_teacher.loss_feature'] > 0
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert not [module for module in model.backbone.modules() if module._forward_hooks]
    with torch.no_grad():
        plain = model.eval()(*batch_of(), mode='loss')
    assert not any(name.startswith('self_teacher') for name in plain)


def batch_of():
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 11, (1, 64, 64)))) for _ in range(2)]
    return torch.randn(2, 3, 64, 64), samples


def test_a_network_with_maps_of_one_size_is_refused(voc, tmp_path):
    cfg = config(voc, tmp_path)
    size = dict(img_size=(128, 128), embed_dims=16, num_layers=2, num_heads=2, out_indices=(0, 1))
    cfg.model.backbone = ConfigDict(type='VisionTransformer', **size)
    cfg.model.update(type='selfkd_mmseg.FRSKDEncoderDecoder', auxiliary_head=None)
    with pytest.raises(ValueError, match=r'several sizes, and VisionTransformer has none inside .* use PSKDHook'):
        MODELS.build(cfg.model)


class FixedSize(nn.Module):
    """Runs on images of the crop's size only, or on none."""

    def __init__(self, size, **kwargs):
        super().__init__()
        self.size, self.network = size, MODELS.build(dict(type='ResNet', **kwargs))

    def forward(self, x):
        assert x.shape[2:] == (self.size, self.size), 'of fixed size'
        return self.network(x)


def test_networks_of_fixed_size(voc, tmp_path):
    MODELS.register_module(module=FixedSize, force=True)
    cfg = frskd_config(voc, tmp_path)
    cfg.model.backbone.update(type='FixedSize', size=48)
    assert MODELS.build(cfg.model).self_teacher.in_channels == MAPS
    cfg.model.backbone.size = 50
    message = r'empty image of 3 channels .*AssertionError: of fixed size[\s\S]* set self_teacher.in_channels'
    with pytest.raises(ValueError, match=message):
        MODELS.build(cfg.model)
    cfg.model.self_teacher.in_channels = MAPS
    MODELS.build(cfg.model)


class TwoImages(nn.Module):
    """As the networks of change detection: they compare two."""

    def __init__(self, **kwargs):
        super().__init__()

    def forward(self, x, other):
        return [x, other]


def test_a_network_that_its_own_segmentor_runs_otherwise_is_told_so(voc, tmp_path):
    cfg = frskd_config(voc, tmp_path)
    cfg.model.backbone = dict(type=TwoImages)
    message = "TypeError: .*other.* If the config's model.type was another .*, name it in self_teacher.base_type"
    with pytest.raises(ValueError, match=message):
        MODELS.build(cfg.model)


class OwnSegmentor(EncoderDecoder):
    """With a loss term of its own, and a setting for it."""

    def __init__(self, own_weight=1.0, **kwargs):
        super().__init__(**kwargs)
        self.own_weight = own_weight

    def loss(self, inputs, data_samples):
        own = self.own_weight * self.decode_head.conv_seg.weight.abs().sum()
        return {**super().loss(inputs, data_samples), 'loss_own': own}


@pytest.fixture
def own_segmentor():
    MODELS.register_module(module=OwnSegmentor)
    yield
    del MODELS.module_dict['OwnSegmentor']


@pytest.mark.usefixtures('own_segmentor')
def test_an_own_segmentor_is_asked_for_and_keeps_its_loss(voc, tmp_path):
    cfg = frskd_config(voc, tmp_path, teacher={'warmup': 0.0})
    with pytest.raises(
        ValueError, match="OwnSegmentor. What .* lost .* set self_teacher.base_type .* 'OwnSegmentor' or"
    ):
        MODELS.build(cfg.model)
    cfg.model.self_teacher.base_type = 'EncoderDecoder'
    assert type(MODELS.build(cfg.model)).__name__ == 'FRSKDEncoderDecoder'
    cfg.model.self_teacher.base_type = 'FCNHead'
    with pytest.raises(ValueError, match='base_type must name EncoderDecoder or a class made from it, got FCNHead'):
        MODELS.build(cfg.model)
    cfg.model.self_teacher.base_type, cfg.model.own_weight = 'OwnSegmentor', 2.0
    runner = train(cfg, watch := Watch())
    assert isinstance(runner.model, OwnSegmentor)
    for before, _, outputs in watch.steps:
        assert outputs['loss_own'] == pytest.approx(2 * before.decode_head.conv_seg.weight.abs().sum().item(), rel=1e-5)
        assert outputs['self_teacher.loss_kd'] > 0
    cfg.model.type = 'OwnSegmentor'
    del cfg.model.self_teacher
    weights = {name: value for name, value in runner.model.state_dict().items() if 'self_teacher' not in name}
    MODELS.build(cfg.model).load_state_dict(weights, strict=True)


def test_an_exchanged_loss_is_an_error(voc, tmp_path):
    class Exchange(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 2:
                runner.model.decode_head.loss_decode = MODELS.build(dict(type='CrossEntropyLoss', loss_weight=2.0))

    with pytest.raises(RuntimeError, match='decode_head.loss_decode was exchanged in the middle of the run'):
        train(frskd_config(voc, tmp_path), Exchange())


@pytest.mark.parametrize('calls', [0, 2])
def test_a_head_whose_logits_are_not_known_is_an_error(voc, tmp_path, calls):
    """Not a plain run."""
    runner = Runner.from_cfg(frskd_config(voc, tmp_path))
    head = runner.model.decode_head
    by_feat = head.loss_by_feat
    head.loss_by_feat = lambda *args: (
        [by_feat(*args) for _ in range(calls)][0] if calls else {'loss_ce': args[0].mean()}
    )
    with pytest.raises(RuntimeError, match=f'FCNHead called its loss {calls} times in a training step'):
        runner.train()
