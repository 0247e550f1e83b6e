"""PS-KD in real MMPretrain training runs."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from helpers.mmengine import (
    Recorder,
    assert_same_state,
    by_iterations,
    digits_config,
    find_hook,
    train,
    train_in_processes,
)
from mmengine.config import Config
from mmengine.runner import Runner, load_checkpoint
from mmpretrain.registry import MODELS

from selfkd import past_bank
from selfkd.bank import PredictionBank
from selfkd.teacher import SnapshotTeacher
from selfkd_mmengine import pskd_hook

PSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)
SNAPSHOT = dict(PSKD, teacher='snapshot')


def expected_losses(steps, alpha_of, hard_target, keep_hard=False, bank_momentum=0.0):
    """Each step's loss, restated from the paper in float64, out of the logits that were captured on the way."""
    past, losses = {}, []
    for step in steps:
        log_probs = step['logits'].double().log_softmax(1)
        hard = hard_target(step['label']).double()
        before = torch.stack([past.get(path, row * (not keep_hard)) for path, row in zip(step['paths'], hard)])
        alpha = alpha_of(step)
        share = 1 if keep_hard else 1 - alpha
        losses.append(-((share * hard + alpha * before) * log_probs).sum(1).mean().item())
        for path, probs in zip(step['paths'], log_probs.exp()):
            old = past.get(path, probs)
            past[path] = bank_momentum * old + (1 - bank_momentum) * probs
    return losses


def onehot(label):
    return F.one_hot(label, 10)


def test_three_epochs_recomputed_from_captured_logits(digits, tmp_path):
    recorder = Recorder()
    train(digits_config(digits, tmp_path, PSKD), recorder)
    expected = expected_losses(recorder.steps, lambda step: 0.8 * (step['epoch'] + 1) / 3, onehot)
    assert len(expected) == 15
    assert [step['loss'] for step in recorder.steps] == pytest.approx(expected, rel=1e-5)
    plain = [step['plain'].item() for step in recorder.steps]
    assert plain[:5] == pytest.approx(expected[:5], rel=1e-5)  # epoch 0 is plain cross-entropy
    assert all(abs(a - b) > 1e-3 for a, b in zip(plain[10:], expected[10:]))


@pytest.mark.parametrize('options', [dict(keep_hard=True), dict(bank_momentum=0.6)])
def test_options_recomputed_with_samples_that_are_new_in_later_passes(digits, tmp_path, options):
    recorder = Recorder()
    cfg = digits_config(digits, tmp_path, dict(PSKD, **options), **{'train_dataloader.dataset.indices': 38})
    train(by_iterations(cfg, 13), recorder)
    expected = expected_losses(recorder.steps, lambda step: 0.8 * (step['iter'] // 5 * 5) / 13, onehot, **options)
    assert [step['loss'] for step in recorder.steps] == pytest.approx(expected, rel=1e-5)


def test_iteration_based_loop_recomputed(digits, tmp_path):
    recorder = Recorder()
    train(by_iterations(digits_config(digits, tmp_path, PSKD), 12), recorder)
    # 5 iterations are one pass over the data; alpha is the share of iterations done at the start of the pass
    expected = expected_losses(recorder.steps, lambda step: 0.8 * (step['iter'] // 5 * 5) / 12, onehot)
    assert [step['loss'] for step in recorder.steps] == pytest.approx(expected, rel=1e-5)
    assert [round(step['pskd_alpha'], 4) for step in recorder.steps[::5]] == [
        0,
        round(0.8 * 5 / 12, 4),
        round(8 / 12, 4),
    ]


def test_smoothed_labels_are_the_hard_part_and_not_smoothed_twice(digits, tmp_path):
    recorder = Recorder()
    loss = dict(type='LabelSmoothLoss', label_smooth_val=0.1)
    train(digits_config(digits, tmp_path, PSKD, **{'model.head.loss': loss}), recorder)
    expected = expected_losses(
        recorder.steps, lambda step: 0.8 * (step['epoch'] + 1) / 3, lambda label: 0.9 * onehot(label) + 0.1 / 10
    )
    assert [step['loss'] for step in recorder.steps] == pytest.approx(expected, rel=1e-5)


def test_class_weights_and_loss_weight_act_on_both_parts(digits, tmp_path):
    recorder, weight = Recorder(), [0.5] * 5 + [2.0] * 5
    loss = dict(type='CrossEntropyLoss', class_weight=weight, loss_weight=3.0)
    train(digits_config(digits, tmp_path, PSKD, **{'model.head.loss': loss}), recorder)
    past = {}
    for step in recorder.steps:
        log_probs = step['logits'].double().log_softmax(1)
        hard, alpha = onehot(step['label']).double(), 0.8 * (step['epoch'] + 1) / 3
        before = torch.stack([past.get(path, row) for path, row in zip(step['paths'], hard)])
        target = ((1 - alpha) * hard + alpha * before) * torch.tensor(weight)
        assert step['loss'] == pytest.approx(-3 * (target * log_probs).sum(1).mean().item(), rel=1e-5)
        past.update(zip(step['paths'], log_probs.exp()))


DROPOUT_HEAD = dict(
    type='StackedLinearClsHead', num_classes=10, in_channels=32, mid_channels=[16], dropout_rate=0.5, act_cfg=None
)


@pytest.mark.parametrize(('mode', 'mixup'), [('train', False), ('train', True), ('eval', False)])
def test_snapshot_teaches_with_the_previous_epochs_model_on_the_present_inputs(digits, tmp_path, mode, mixup):
    """In the mode that it trained in (with dropout drawn anew, batch norm by the batch), or in evaluation mode."""
    recorder = Recorder()
    cfg = digits_config(digits, tmp_path, dict(SNAPSHOT, teacher_mode=mode), **{'model.head': DROPOUT_HEAD})
    if mixup:
        cfg.data_preprocessor.batch_augments = dict(
            augments=[dict(type='Mixup', alpha=1.0), dict(type='CutMix', alpha=1.0)]
        )
    cfg.default_hooks.checkpoint.max_keep_ckpts = 3
    runner = train(cfg, recorder)
    for step in recorder.steps:
        alpha = 0.8 * (step['epoch'] + 1) / 3
        hard = step['label'] if mixup else onehot(step['label'])
        assert mixup == bool(((hard > 0) & (hard < 1)).any())
        past = hard
        if step['epoch'] > 0:
            before = copy.deepcopy(runner.model)
            load_checkpoint(before, str(tmp_path / f'epoch_{step["epoch"]}.pth'))
            with torch.no_grad():
                past = before.eval()(step['inputs'], mode='tensor').softmax(1)
            if mode == 'train':
                before.train()
                teacher = SnapshotTeacher(before)
                teacher.begin_step(step['iter'])  # its dropout follows from the step
                sharp, past = past, teacher(step['inputs'], mode='tensor').softmax(1)
                assert (sharp - past).abs().max() > 1e-3
        expected = F.cross_entropy(step['logits'], (1 - alpha) * hard.float() + alpha * past)
        assert step['loss'] == pytest.approx(expected.item(), rel=1e-4)


def test_alpha_0_beside_mixup_trains_to_the_vanilla_weights(digits, tmp_path):
    """Mixup draws random numbers, which the teacher must not use up."""
    mixup = {'data_preprocessor.batch_augments': dict(augments=[dict(type='Mixup', alpha=1.0)])}
    vanilla = train(digits_config(digits, tmp_path / 'vanilla', **mixup)).model.state_dict()
    ours = train(digits_config(digits, tmp_path / 'ours', dict(SNAPSHOT, alpha=0.0), **mixup)).model.state_dict()
    assert_same_state(ours, vanilla)


def test_logged_parts_add_up_and_reach_tensorboard(digits, tmp_path):
    cfg = digits_config(digits, tmp_path, PSKD)
    cfg.default_hooks.logger.interval = 1
    cfg.visualizer = dict(
        type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    )
    train(cfg, recorder := Recorder())
    for step in recorder.steps:
        assert step['pskd_hard'] + step['pskd_soft'] == pytest.approx(step['loss'], rel=1e-5)
    assert [step['pskd_entropy'] > 0 for step in recorder.steps] == [False] * 5 + [True] * 10
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.glob('*/vis_data')))).Reload()
    alphas = [event.value for event in events.Scalars('pskd_alpha')]
    assert alphas == pytest.approx([step['pskd_alpha'] for step in recorder.steps])
    assert {'pskd_hard', 'pskd_soft', 'pskd_entropy'} <= set(events.Tags()['scalars'])


@pytest.fixture
def amp_on_cpu(monkeypatch):
    """AmpOptimWrapper refuses to be built without an accelerator, though its autocast supports bfloat16 on the CPU."""
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)


@pytest.mark.usefixtures('amp_on_cpu')
@pytest.mark.parametrize('hook', [dict(PSKD, top_k=3, bank_dtype='float16'), SNAPSHOT])
def test_beside_accumulation_amp_ema_and_frozen_layers(digits, tmp_path, hook):
    cfg = digits_config(digits, tmp_path, hook, dict(type='EMAHook', ema_type='ExponentialMovingAverage'))
    cfg.optim_wrapper = dict(
        type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0, accumulative_counts=2, **cfg.optim_wrapper
    )
    cfg.model.backbone.frozen_stages = 1
    cfg.train_cfg.val_interval = 1
    train(cfg, recorder := Recorder())
    assert recorder.steps[0]['logits'].dtype == torch.bfloat16
    # accumulation over steps does not advance alpha twice
    assert [step['pskd_alpha'] for step in recorder.steps] == pytest.approx([0.8 / 3] * 5 + [1.6 / 3] * 5 + [0.8] * 5)
    assert all(torch.isfinite(torch.tensor(step['loss'])) for step in recorder.steps)
    assert recorder.steps[-1]['pskd_soft'] > 0
    saved = torch.load(tmp_path / 'epoch_3.pth')
    assert 'ema_state_dict' in saved
    MODELS.build(cfg.model).load_state_dict(saved['state_dict'], strict=True)


@pytest.mark.usefixtures('amp_on_cpu')
def test_loss_of_bfloat16_logits_is_computed_in_float32(digits, tmp_path):
    cfg = digits_config(digits, tmp_path, PSKD)
    cfg.optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0, **cfg.optim_wrapper)
    train(cfg, recorder := Recorder())
    expected = expected_losses(recorder.steps, lambda step: 0.8 * (step['epoch'] + 1) / 3, onehot)
    assert [step['loss'] for step in recorder.steps] == pytest.approx(expected, rel=1e-4)


def test_checkpoint_is_plain_and_loads_strictly_into_the_vanilla_model(digits, tmp_path):
    runner = train(digits_config(digits, tmp_path, PSKD))
    saved = torch.load(tmp_path / 'epoch_3.pth')
    torch.save(saved['selfkd'], tmp_path / 'ours.pth')
    ours = torch.load(tmp_path / 'ours.pth', weights_only=True)
    assert_same_state(ours['PSKDHook']['bank'], find_hook(runner, 'PSKDHook').past.bank.state_dict())
    vanilla = MODELS.build(digits_config(digits, tmp_path).model)
    vanilla.load_state_dict(saved['state_dict'], strict=True)
    assert not runner.model.head.loss_module._forward_hooks  # the tap is gone after training


def test_validation_leaves_the_bank_alone(digits, tmp_path):
    runner = train(digits_config(digits, tmp_path, PSKD))
    before = find_hook(runner, 'PSKDHook').past.bank.state_dict()
    runner.val()
    assert_same_state(find_hook(runner, 'PSKDHook').past.bank.state_dict(), before)


# Resume


def test_bank_of_a_training_set_of_another_size_is_refused(digits, tmp_path):
    train(digits_config(digits, tmp_path, PSKD, **{'train_cfg.max_epochs': 2}))
    smaller = digits_config(digits, tmp_path, PSKD, resume=True, **{'train_dataloader.dataset.indices': 32})
    with pytest.raises(ValueError, match='the saved bank has num_samples=40, this one num_samples=32: resume with the'):
        train(smaller)


def test_resume_from_a_run_without_the_hook_says_that_the_bank_starts_empty(digits, tmp_path, caplog):
    train(digits_config(digits, tmp_path, **{'train_cfg.max_epochs': 1}))
    cfg = digits_config(digits, tmp_path, PSKD, resume=True, log_level='WARNING')
    train(cfg, recorder := Recorder())
    logs = ''.join(path.read_text() for path in tmp_path.rglob('*.log'))
    assert "the checkpoint holds no past of teacher='bank'" in ' '.join(logs.split())
    first = recorder.steps[0]
    assert first['epoch'] == 1
    assert first['loss'] == pytest.approx(first['plain'].item())


@pytest.mark.parametrize('dtype', ['float32', 'log8'])
def test_resuming_with_a_large_bank_beside_the_checkpoints_is_exact(digits, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(past_bank, 'LARGE', 1)
    checkpoint = {'default_hooks.checkpoint.max_keep_ckpts': 3, 'default_hooks.checkpoint.save_best': 'auto'}
    options = {'train_cfg.val_interval': 1, **checkpoint}
    hook = dict(PSKD, bank_dtype=dtype)
    straight = train(digits_config(digits, tmp_path / 'straight', hook, **options))
    folder = tmp_path / 'straight'
    saved = torch.load(folder / 'epoch_2.pth', weights_only=False)['selfkd']['PSKDHook']['bank']
    assert (saved['step'], saved['file']) == ('iteration 10', str(folder / 'selfkd_bank_2.pth'))
    assert not list(tmp_path.glob('straight/selfkd_bank_3*'))  # the best checkpoints' are those of their epochs
    options.update(resume=True, load_from=str(folder / 'epoch_2.pth'))
    resumed = train(digits_config(digits, tmp_path / 'resumed', hook, **options))
    assert_same_state(resumed.model.state_dict(), straight.model.state_dict())
    banks = [find_hook(run, 'PSKDHook').past.bank.state_dict() for run in (straight, resumed)]
    assert_same_state(*banks)
    options['load_from'] = str(folder / 'epoch_1.pth')
    with pytest.raises(ValueError, match='checkpoint is of iteration 5, .*bank_1.pth holds that of iteration 15'):
        train(digits_config(digits, tmp_path / 'resumed', hook, **options))


def test_one_of_several_ranks_writes_the_large_bank(digits, tmp_path, monkeypatch):
    """FSDPStrategy asks all of them for their state."""
    monkeypatch.setattr(past_bank, 'LARGE', 1)
    runner = train(digits_config(digits, tmp_path, PSKD, **{'train_cfg.max_epochs': 2}))
    hook = find_hook(runner, 'PSKDHook')
    assert 'file' in hook.state_dict(runner, 10)['bank']
    monkeypatch.setattr(pskd_hook, 'is_main_process', lambda: False)
    assert 'values' in hook.state_dict(runner, 15)['bank']


# Two processes


def test_two_processes_hold_the_bank_of_a_single_one(digits, tmp_path):
    """Both ranks' banks hold the predictions that either rank made, the last one of each sample."""
    (tmp_path / 'dump_bank.py').write_text(
        """
import os, torch
from mmengine.hooks import Hook
from helpers.mmengine import Recorder, find_hook
class DumpBank(Recorder):
    def after_train(self, runner):
        hook = find_hook(runner, 'PSKDHook')
        dataset = runner.train_dataloader.dataset
        paths = {dataset.get_data_info(n)['img_path']: n for n in range(len(dataset))}
        bank, weights = hook.past.bank.state_dict(), runner.model.state_dict()
        torch.save(dict(bank=bank, steps=self.steps, paths=paths, weights=weights),
                   os.path.join(runner.work_dir, f'rank{runner.rank}.pth'))
"""
    )
    cfg = digits_config(digits, tmp_path / 'run', dict(type='dump_bank.DumpBank'), PSKD)
    cfg.train_dataloader.batch_size = 6
    cfg.train_dataloader.dataset.indices = 39  # 20 samples on each rank, so one of them twice
    train_in_processes(cfg, tmp_path)
    ranks = [torch.load(tmp_path / f'run/rank{rank}.pth') for rank in range(2)]
    assert_same_state(ranks[0]['bank'], ranks[1]['bank'])
    for name, value in ranks[0]['weights'].items():  # batch-norm statistics are each rank's own in mmengine
        if 'running' not in name:
            torch.testing.assert_close(value, ranks[1]['weights'][name], rtol=0, atol=0)
    expected = torch.zeros(39, 10)
    for both in zip(ranks[0]['steps'], ranks[1]['steps']):
        for step in both:
            rows = [ranks[0]['paths'][path] for path in step['paths']]
            for row, probs in zip(rows, step['logits'].softmax(1)):
                expected[row] = probs
    assert ranks[0]['bank']['seen'].all()
    torch.testing.assert_close(ranks[0]['bank']['values'], expected, rtol=0, atol=0)
    # and the losses of every step used the predictions that either rank made in the epoch before
    for step in ranks[0]['steps'][4:]:
        assert step['pskd_entropy'] > 0


# Ways to switch it on


def test_command_line_alone_switches_it_on(digits, tmp_path):
    command = [
        sys.executable,
        str(ROOT / 'tools/train.py'),
        str(ROOT / 'configs/mmpretrain/_base_/digits.py'),
        '--work-dir',
        str(tmp_path),
    ]
    command += [
        '--cfg-options',
        f'train_dataloader.dataset.data_root={digits}',
        f'val_dataloader.dataset.data_root={digits}',
    ]
    command += ['train_cfg.max_epochs=2', 'default_hooks.logger.interval=1']
    command += ['default_hooks.pskd.type=selfkd_mmpretrain.PSKDHook', 'default_hooks.pskd.alpha=0.8']
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert 'pskd_alpha: 0.8000' in outcome.stdout + outcome.stderr


def test_fragment_among_the_bases(tmp_path):
    bases = [str(ROOT / f'configs/mmpretrain/_base_/{name}.py') for name in ('digits', 'pskd')]
    (tmp_path / 'mine.py').write_text(f'_base_ = {bases!r}\n')
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert cfg.custom_hooks == [dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.3)]
    measured = Config.fromfile(ROOT / 'configs/mmpretrain/pskd/resnet18-w16_1xb50_digits.py')
    assert measured.default_hooks.pskd == dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)  # of docs/evidence


def test_new_style_config(digits, tmp_path):
    config = tmp_path / 'new_style.py'
    base = digits_config(digits, tmp_path / 'run')
    config.write_text(
        'from mmengine.config import read_base\n'
        'from selfkd_mmpretrain import PSKDHook\n'
        'with read_base():\n    from .base import *\n'
        'custom_hooks = [dict(type=PSKDHook, alpha=0.5)]\n'
    )
    (tmp_path / 'base.py').write_text('\n'.join(f'{key} = {value!r}' for key, value in base.to_dict().items()))
    cfg = Config.fromfile(config)
    cfg.experiment_name += '-new-style'
    assert find_hook(train(cfg), 'PSKDHook').alpha == 0.5


# Refusals


def refused(message, cfg, error=ValueError):
    with pytest.raises(error, match=message):
        train(cfg)


@pytest.mark.parametrize(
    ('hook', 'message'),
    [
        (dict(PSKD, alpha=[0, 8]), r'PSKDHook: alpha must be a number, as 0.5, got \[0, 8\]'),
        (dict(PSKD, alpha=True), 'PSKDHook: alpha must be a number, as 0.5, got True'),
        (dict(PSKD, alpha=1.2), r'alpha must lie in \[0, 1\], got 1.2'),
        (dict(PSKD, teacher='cnn'), r"teacher must be one of \['auto', 'bank', 'snapshot', 'ema'\], got 'cnn'"),
        (dict(PSKD, bank_dtype='int8'), r"bank_dtype: must be one of \['float32', 'float16', 'log8'\], got 'int8'"),
        (dict(SNAPSHOT, top_k=4), "with teacher='snapshot' top_k would do nothing: remove"),
        (dict(SNAPSHOT, ema_decay=0.9), "with teacher='snapshot' ema_decay would do nothing: remove"),
        (dict(PSKD, teacher='ema', bank_momentum=0.5), "with teacher='ema' bank_momentum would do nothing: remove"),
        (dict(PSKD, teacher='ema', ema_decay=1.0), r'ema_decay must lie in \[0, 1\), got 1.0'),
        (dict(PSKD, bank_momentum=0.5, top_k=3), 'bank_momentum=0.5 averages whole predictions, and with top_k=3'),
        (dict(PSKD, top_k=11), r'top_k: must lie in \[1, num_classes=10\] or be None, got 11'),
        (
            dict(PSKD, teacher='bank', teacher_mode='eval', interval=3),
            "with teacher='bank' teacher_mode and interval would do nothing",
        ),
        (dict(SNAPSHOT, teacher_mode='test'), r"teacher_mode must be one of \['train', 'eval'\], got 'test'"),
        (dict(SNAPSHOT, interval=0), r'interval must be a positive number of steps, got 0'),
        (dict(SNAPSHOT, interval=2.5), r'interval must be a positive number of steps, got 2.5'),
        (
            dict(SNAPSHOT, interval=3),
            r'interval works in an iteration-based training loop only',
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(digits, tmp_path, hook, message):
    refused(message, digits_config(digits, tmp_path, hook))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'model.head.loss': dict(type='FocalLoss')}, r'LinearClsHead trains with FocalLoss, which is not the cross'),
        (
            {'model.head': dict(type='ArcFaceClsHead', num_classes=10, in_channels=32)},
            'PSKDHook: ArcFaceClsHead trains on logits with a margin, which are not its predictions',
        ),
        ({'model.head.num_classes': 12}, r'training set has 10 classes, the head 12: set model.head.num_classes=10'),
        (
            {'data_preprocessor.batch_augments': dict(augments=dict(type='Mixup', alpha=0.2))},
            r"batch augmentations .* set teacher='snapshot', or remove batch_augments",
        ),
    ],
)
def test_models_that_cannot_work_are_refused_at_the_start(digits, tmp_path, options, message):
    refused(message, digits_config(digits, tmp_path, dict(PSKD, teacher='bank'), **options))


def test_a_head_without_loss_module_is_refused(digits, tmp_path):
    cfg = digits_config(digits, tmp_path, PSKD)
    cfg.model.head = None
    refused('ImageClassifier with the head NoneType has no loss_module .* no class prediction to distil', cfg)


@MODELS.register_module()
class RepeatingHead(MODELS.get('LinearClsHead')):
    """Calls its loss module twice."""

    def loss(self, feats, data_samples, **kwargs):
        super().loss(feats, data_samples)
        return super().loss(feats, data_samples)


def test_a_tap_that_fires_twice_is_an_error(digits, tmp_path):
    config = digits_config(digits, tmp_path, PSKD, **{'model.head.type': 'RepeatingHead'})
    refused('called more than once', config, RuntimeError)


@MODELS.register_module()
class MarginHead(MODELS.get('LinearClsHead')):
    """Trains on its logits less one for the label."""

    def loss(self, feats, data_samples, **kwargs):
        cls_score, label = self(feats), torch.cat([sample.gt_label for sample in data_samples])
        return self._get_loss(cls_score - F.one_hot(label, 10), data_samples, **kwargs)


@pytest.mark.parametrize('hook', [PSKD, dict(type='selfkd_mmpretrain.CSKDHook')])
def test_a_head_that_trains_on_other_logits_than_it_predicts_is_an_error(digits, tmp_path, hook):
    cfg = digits_config(digits, tmp_path, hook, **{'model.head.type': 'MarginHead'})
    refused(r'KDHook: CrossEntropyLoss is trained on other logits than those that the head predicts', cfg, RuntimeError)


@pytest.mark.parametrize('hook', [PSKD, SNAPSHOT, dict(type='selfkd_mmpretrain.CSKDHook')])
def test_retriever(digits, tmp_path, hook):
    """Its forward gives features, not logits."""
    cfg = digits_config(digits, tmp_path, hook)
    encoder = [cfg.model.backbone, cfg.model.neck]
    cfg.model = dict(type='ImageToImageRetriever', image_encoder=encoder, head=cfg.model.head, prototype='none')
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    train(cfg, recorder := Recorder())
    last = recorder.steps[-1]
    if 'CSKD' in hook['type']:
        assert last['loss_cskd'] > 0
    else:
        assert last['pskd_soft'] > 0
        assert last['loss'] == pytest.approx(last['pskd_hard'] + last['pskd_soft'], rel=1e-5)


def test_a_classifier_inside_the_backbone(digits, tmp_path):
    """As VGG's or InceptionV3's: the head does not know the number of classes, the training set does."""
    cfg = digits_config(digits, tmp_path, PSKD)
    linear = dict(type='LinearNeck', in_channels=32, out_channels=10, norm_cfg=None)
    cfg.model.neck, cfg.model.head = [cfg.model.neck, linear], dict(type='ClsHead')
    assert find_hook(train(cfg), 'PSKDHook').past.bank.num_classes == 10


def test_predictions_that_the_bank_did_not_take_are_logged(digits, tmp_path, monkeypatch):
    """They come from accelerators; the count stands in for one here."""
    train(digits_config(digits, tmp_path / 'none', PSKD, **{'train_cfg.max_epochs': 2}), none := Recorder())
    monkeypatch.setattr(PredictionBank, 'skipped', property(lambda bank: 3))
    train(digits_config(digits, tmp_path / 'some', PSKD, **{'train_cfg.max_epochs': 2}), some := Recorder())
    assert not any('pskd_skipped' in step for step in none.steps)
    assert all(step['pskd_skipped'] == 3 for step in some.steps)


def test_a_model_that_is_never_called_is_an_error(digits, tmp_path):
    runner = Runner.from_cfg(digits_config(digits, tmp_path, PSKD))
    runner.model._run_forward = lambda data, mode: runner.model.loss(data['inputs'], data['data_samples'])
    with pytest.raises(RuntimeError, match='could not be tapped'):
        runner.train()
