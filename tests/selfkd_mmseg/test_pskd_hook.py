"""PS-KD per pixel in real MMSegmentation training runs."""

import pytest
import torch
import torch.nn.functional as F
from helpers.mmengine import assert_same_state, train
from helpers.mmseg import config
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.runner import load_checkpoint
from mmseg.models.losses import CrossEntropyLoss
from mmseg.registry import MODELS

PSKD = dict(type='selfkd_mmseg.PSKDHook', alpha=0.8, interval=3)


class Pixels(Hook):
    """Keeps what went through the decode head's loss module in each step, and the logged values."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.steps = []

    def before_train(self, runner):
        runner.model.register_forward_pre_hook(self._inputs, with_kwargs=True)
        losses = runner.model.decode_head.loss_decode
        first = losses[0] if isinstance(losses, torch.nn.ModuleList) else losses
        first.register_forward_hook(self._loss, with_kwargs=True)

    def _inputs(self, model, args, kwargs):
        if kwargs['mode'] == 'loss':
            self.steps.append(dict(inputs=kwargs['inputs'].clone()))

    def _loss(self, module, args, kwargs, output):
        self.steps[-1].update(logits=args[0].detach().clone(), label=args[1].clone(), weight=kwargs['weight'])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1].update(iter=runner.iter, outputs={k: v.item() for k, v in outputs.items() if v.numel() == 1})


HEAD, LOSS = 'model.decode_head', 'model.decode_head.loss_decode'
WEIGHTS = [0.2] + [1.0] * 9 + [2.0]
CASES = {
    'plain': {},
    'hard label kept': {},
    'past copy in evaluation mode': {},
    'avg_non_ignore': {'model.decode_head.loss_decode.avg_non_ignore': True},
    'loss_weight': {'model.decode_head.loss_decode.loss_weight': 2.0},
    # mmseg itself fails on ignored pixels with class weights
    'class weights': {f'{LOSS}.class_weight': WEIGHTS},
    'class weights, an ignored class': {f'{LOSS}.class_weight': WEIGHTS, f'{HEAD}.ignore_index': 0},
    'class weights, an ignored class that does not count': {
        f'{LOSS}.class_weight': WEIGHTS,
        f'{HEAD}.ignore_index': 0,
        f'{LOSS}.avg_non_ignore': True,
    },
    'ohem': {f'{HEAD}.sampler': dict(type='OHEMPixelSampler', thresh=0.7, min_kept=100)},
    # which calls the loss itself: DeepLabV3 with d16-mg124
    'ohem without threshold': {f'{HEAD}.sampler': dict(type='OHEMPixelSampler', min_kept=100)},
    'two losses': {
        'model.decode_head.loss_decode': [
            dict(type='CrossEntropyLoss', loss_name='loss_ce'),
            dict(type='DiceLoss', loss_name='loss_dice'),
        ]
    },
}


@pytest.mark.parametrize('case', CASES)
def test_loss_recomputed_from_earlier_checkpoints(voc, tmp_path, case):
    mode = 'eval' if 'evaluation' in case else 'train'
    keep = 'kept' in case
    cfg = config(voc, tmp_path, dict(PSKD, teacher_mode=mode, keep_hard=keep), **CASES[case])
    weighted, ignored = 'class weights' in case, CASES[case].get(f'{HEAD}.ignore_index', 255)
    weights = torch.tensor(WEIGHTS if weighted else [1.0] * 11)
    cfg.train_dataloader.dataset.pipeline[2]['void'] = not weighted
    train(cfg, pixels := Pixels())
    assert len(pixels.steps) == 7
    teacher = MODELS.build(cfg.model).train(mode == 'train')
    assert (pixels.steps[0]['label'] == 255).any() == (not weighted)
    for step in pixels.steps:
        label, since = step['label'], step['iter'] // 3 * 3
        valid = label != ignored
        target = F.one_hot(label.masked_fill(~valid, 0), 11).permute(0, 3, 1, 2).double()
        if since:
            load_checkpoint(teacher, str(tmp_path / f'iter_{since}.pth'), strict=True)
            with torch.no_grad():
                past = teacher(step['inputs'], mode='tensor')
            past = F.interpolate(past, label.shape[1:], mode='bilinear').softmax(1)
            alpha = 0.8 * since / 7
            assert step['outputs']['pskd_alpha'] == pytest.approx(alpha)
            target = (1 - alpha * (not keep)) * target + alpha * past
        target = target * weights.view(-1, 1, 1)
        each = -(target * step['logits'].double().log_softmax(1)).sum(1) * valid
        if 'ohem' in case:
            each = each * step['weight']
        counted = valid if CASES[case].get(f'{LOSS}.avg_non_ignore') else torch.ones_like(valid)
        count = weights[label][counted].sum() if weighted else counted.sum()
        expected = CASES[case].get(f'{LOSS}.loss_weight', 1) * each.sum() / count
        assert step['outputs']['decode.loss_ce'] == pytest.approx(expected.item(), rel=1e-4)
    assert pixels.steps[-1]['outputs']['pskd_soft'] > 0
    assert pixels.steps[-1]['outputs']['pskd_entropy'] > 0
    assert 'aux.loss_ce' in pixels.steps[-1]['outputs']


def test_with_next_to_no_weight_it_trains_to_the_vanilla_weights(voc, tmp_path):
    """The teacher runs: with dropout in the student, it must use up no random number."""
    dropout = {'model.decode_head.dropout_ratio': 0.1}
    vanilla = train(config(voc, tmp_path / 'vanilla', **dropout)).model.state_dict()
    ours = train(config(voc, tmp_path / 'ours', dict(PSKD, alpha=1e-30), **dropout)).model.state_dict()
    assert_same_state(ours, vanilla)


def test_sliding_inference_is_that_of_the_vanilla_model(voc, tmp_path):
    options = {'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32))}
    runner = train(config(voc, tmp_path, PSKD, **options))
    vanilla = MODELS.build(runner.cfg.model).eval()
    load_checkpoint(vanilla, str(tmp_path / 'iter_7.pth'), strict=True)
    batch = next(iter(runner.val_dataloader))
    runner.model.eval()
    with torch.no_grad():
        ours, theirs = runner.model.test_step(batch)[0], vanilla.test_step(batch)[0]
    torch.testing.assert_close(ours.seg_logits.data, theirs.seg_logits.data, rtol=0, atol=0)


def test_resume_between_two_snapshots_is_exact(voc, tmp_path):
    results, stop = [], 5
    for name in ('straight', 'resumed'):
        cfg = config(voc, tmp_path / name, PSKD)
        train(cfg)
        if name == 'resumed':  # from the checkpoint that a killed run would have left
            for later in range(stop + 1, 8):
                (tmp_path / name / f'iter_{later}.pth').unlink()
            (tmp_path / name / 'last_checkpoint').write_text(str(tmp_path / name / f'iter_{stop}.pth'))
            cfg.resume = True
            cfg.experiment_name += '-resumed'
            train(cfg)
        results.append(torch.load(tmp_path / name / 'iter_7.pth'))
    for key in ('state_dict', 'optimizer', 'selfkd'):
        assert_same_state(results[0][key], results[1][key])


def test_a_bank_is_refused(voc, tmp_path):
    with pytest.raises(ValueError, match="pixels of random crops keep no identity .* set teacher='snapshot' or 'ema'"):
        train(config(voc, tmp_path, dict(PSKD, teacher='bank', interval=None)))


def test_accumulation_and_ema(voc, tmp_path):
    cfg = config(voc, tmp_path, PSKD, dict(type='EMAHook'), **{'optim_wrapper.accumulative_counts': 2})
    train(cfg, pixels := Pixels())
    assert [s['outputs']['pskd_alpha'] for s in pixels.steps] == pytest.approx([0] * 3 + [2.4 / 7] * 3 + [4.8 / 7])


def test_mixed_precision(voc, tmp_path, monkeypatch):
    """bfloat16 forward passes of both, targets and softmax in float32; the weights stay finite."""
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    cfg = config(voc, tmp_path, PSKD)
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
    runner = train(cfg, pixels := Pixels())
    last = pixels.steps[-1]
    assert last['logits'].dtype == torch.bfloat16
    hard = F.cross_entropy(last['logits'].float(), last['label'], ignore_index=255, reduction='sum')
    alpha = 0.8 * 6 / 7
    expected = (1 - alpha) * hard / last['label'].numel()
    assert last['outputs']['pskd_hard'] == pytest.approx(expected.item(), rel=1e-2)
    assert last['outputs']['pskd_soft'] > 0
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'model.decode_head.loss_decode': dict(type='CrossEntropyLoss', use_sigmoid=True, class_weight=WEIGHTS)},
            'class_weight of a CrossEntropyLoss with use_sigmoid=True .* remove class_weight',
        ),
        ({'model.decode_head.loss_decode': dict(type='DiceLoss')}, r"FCNHead trains with \['DiceLoss'\]"),
        (
            {'model.decode_head.type': 'STDCHead'},
            r'EncoderDecoder with STDCHead is not supported: its outputs are not known .* Use a decode head with',
        ),
        (
            {'model': 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'},
            'EncoderDecoder with Mask2FormerHead is not supported: it classifies the masks that its queries draw',
        ),
        (
            {'model': 'mmseg::knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py'},
            'EncoderDecoder with IterativeDecodeHead is not supported: its kernels, as in K-Net, are refined',
        ),
    ],
)
def test_heads_and_losses_that_cannot_work_are_refused(voc, tmp_path, options, message):
    cfg = config(voc, tmp_path, PSKD)
    loss = options.get('model.decode_head.loss_decode')
    if loss:
        cfg.model.decode_head.loss_decode = ConfigDict(loss)
    elif 'model' in options:
        cfg.model.decode_head = get_config(options['model']).model.decode_head
    else:
        cfg.merge_from_dict(options)
    with pytest.raises(ValueError, match=message):
        train(cfg)


class Focal(CrossEntropyLoss):
    """Inherits what makes it look like a cross-entropy."""

    def forward(self, cls_score, label, weight=None, ignore_index=255, **kwargs):
        nll = F.cross_entropy(cls_score, label, ignore_index=ignore_index, reduction='none')
        return ((1 - (-nll).exp()) ** 2 * nll).mean()


class Logging(CrossEntropyLoss):
    """The same value, with other names."""

    def forward(self, pred, target, weight=None, **kwargs):
        return super().forward(pred, target, weight=weight, **kwargs)


def test_what_a_loss_computes_decides(voc, tmp_path):
    cfg = config(voc, tmp_path, PSKD)
    cfg.model.decode_head.loss_decode = ConfigDict(type=Focal)
    with pytest.raises(RuntimeError, match='PSKDHook: Focal gives .* where the cross-entropy of its logits is'):
        train(cfg)
    cfg = config(voc, tmp_path, PSKD)
    cfg.model.decode_head.loss_decode = ConfigDict(type=Logging, loss_weight=2.0)
    log = train(cfg).message_hub.log_scalars
    assert (log['train/pskd_soft'].data[0][3:] > 0).all()
