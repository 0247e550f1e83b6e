"""The arithmetic of the criteria, against the formulas written out, in a Trainer of fairseq."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip('fairseq')
from fairseq.data import Dictionary  # noqa: E402
from suites.fairseq import make_trainer  # noqa: E402

from selfkd.bank import PredictionBank  # noqa: E402
from selfkd.losses import distillation_kl  # noqa: E402
from selfkd.metrics import calibration_error, calibration_gaps, confidence_of  # noqa: E402
from selfkd.past import SnapshotPast  # noqa: E402
from selfkd_fairseq.criterions import check_config  # noqa: E402

SMALL = dict(vocabulary=50, dim=16, layers=1, tokens=300, sentences=40, dropout=0.0)
EPSILON, ALPHA = 0.1, 0.3 * 2 / 10  # epoch 2 of 10


def smoothed(target, vocabulary):
    """fairseq's label smoothing: epsilon spread over the other words."""
    q = torch.full((len(target), vocabulary), EPSILON / (vocabulary - 1))
    return q.scatter_(1, target[:, None], 1 - EPSILON)


@pytest.mark.parametrize('past', ['snapshot', 'bank'])
def test_loss_and_gradient_are_those_of_the_mixed_target(past):
    """-sum_c ((1 - a) y_c + a p_c) log p(c) over the tokens that are not padding."""
    whole = ['--pskd-top-k', '50'] if past == 'bank' else []
    trainer, batches = make_trainer(['--pskd-teacher', past, *whole], **SMALL)
    pad = Dictionary().pad()
    batch = next(batch for batch in batches if (batch['target'] == pad).any())
    model, criterion = trainer.get_model(), trainer.criterion
    teacher = criterion.training_run.past
    target = batch['target'].flatten()
    real = target != pad
    assert 0 < real.sum() < len(real)
    if past == 'snapshot':
        with torch.no_grad():
            p = teacher.teacher.model(**batch['net_input'])[0].softmax(-1).view(len(target), -1)
        difference = max(
            (a - b).abs().max().item() for a, b in zip(teacher.teacher.model.parameters(), model.parameters())
        )
        assert difference > 0  # one update into the epoch they are not the same any more
    else:
        teacher.begin_step(1, batch['id'])
        p = teacher.predict(batch['target']).probs.dense(50)

    model.train()
    criterion.train()
    lprobs = model(**batch['net_input'])[0].log_softmax(-1).view(len(target), -1)
    q = (1 - ALPHA) * smoothed(target, 50) + ALPHA * p
    expected = -(q * lprobs).sum(1)[real].sum()
    expected_grad = torch.autograd.grad(expected, model.decoder.embed_tokens.weight)[0]

    loss, sample_size, log = criterion(model, batch)
    grad = torch.autograd.grad(loss, model.decoder.embed_tokens.weight)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)
    assert sample_size == real.sum() == log['ntokens']
    torch.testing.assert_close(log['pskd_soft'], -ALPHA * (p * lprobs).sum(1)[real].sum().detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(log['nll_loss'], -lprobs.gather(1, target[:, None])[real].sum().detach())


@pytest.mark.parametrize('past', [['snapshot'], ['ema', '--store-ema']])
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_the_mode_of_the_past_copy(past, mode):
    """In training it has dropout, drawn anew, whatever mode validation left the model in; the student's is the same."""
    settings = {**SMALL, 'dropout': 0.3}
    trainer, batches = make_trainer(['--pskd-teacher', *past, '--pskd-teacher-mode', mode], **settings)
    trainer.get_model().eval()
    trainer.begin_epoch(3)
    trainer.train_step(batches[:1])
    teacher = trainer.criterion.training_run.past
    model = teacher.teacher.model
    assert {module.training for module in model.modules()} == {mode == 'train'}
    states = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]
    criterion = trainer.criterion
    first, second = (teacher.run(criterion.past_probs, teacher.model, batches[0]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert [np.random.get_state()[1].tolist(), random.getstate()] == states[1:]
    assert torch.equal(first, second) == (mode == 'eval')
    with torch.no_grad():
        plain = model.eval()(**batches[0]['net_input'])[0].softmax(-1).view(-1, 50)
    assert torch.allclose(first, plain, atol=1e-6) == (mode == 'eval')


def test_tokens_are_paired_across_sentences():
    """Token 5 comes twice in the first sentence and once in the second: the two take the one, it either of them."""
    trainer, _ = make_trainer([], criterion='cskd_label_smoothed_cross_entropy', **SMALL)
    model, eos, pad = trainer.get_model().train(), Dictionary().eos(), Dictionary().pad()
    target = torch.tensor([[5, 5, 6, eos], [7, 5, eos, pad]])
    inputs = {'src_tokens': target, 'src_lengths': torch.tensor([4, 3]), 'prev_output_tokens': target.roll(1, 1)}
    sample = {'net_input': inputs, 'target': target, 'ntokens': 7, 'id': torch.arange(2)}
    trainer.criterion.train()
    lprobs = model(**inputs)[0].log_softmax(-1).view(-1, 50)

    def kl(token, partner):
        return distillation_kl(lprobs[[token]], lprobs[[partner]], 4.0, reduction='sum').item()

    certain = kl(0, 5) + kl(1, 5) + kl(3, 6) + kl(6, 3)
    drawn = [trainer.criterion(model, sample)[2]['loss_cskd'].item() - certain for _ in range(30)]
    distance = [[abs(value - kl(5, partner)) for partner in (0, 1)] for value in drawn]
    assert max(map(min, distance)) < 1e-4
    assert {pair.index(min(pair)) for pair in distance} == {0, 1}


def test_bank_holds_what_the_model_predicted():
    """All tokens of it, or of fewer in all updates together what was predicted in all of them."""
    for top_k, updates in ((50, 1), (12, 400)):
        trainer, batches = make_trainer(['--pskd-teacher', 'bank', '--pskd-top-k', str(top_k)], **SMALL)
        model, batch, past = trainer.get_model(), batches[1], trainer.criterion.training_run.past
        trainer.criterion.train()
        model.train()
        kept = 0
        for update in range(updates):
            past.begin_step(update, batch['id'])
            trainer.criterion(model, batch)
            kept = kept + past.predict(batch['target']).probs.dense(50) / updates
        with torch.no_grad():
            probs = model(**batch['net_input'])[0].softmax(-1).view(-1, 50)
        real = batch['target'].flatten() != Dictionary().pad()
        error = (kept - probs)[real].abs().max()
        assert error < (1e-3 if top_k == 50 else 0.012)  # float16; of draws six deviations; of the 12 likeliest: 0.019


def test_bank_refuses_sentences_that_change():
    """Noise in the targets, drawn anew each time: a row was kept for another token."""
    trainer, batches = make_trainer(['--pskd-teacher', 'bank'], **SMALL)
    model, criterion, batch = trainer.get_model().train(), trainer.criterion.train(), batches[0]
    criterion.training_run.past.begin_step(1, batch['id'])
    criterion(model, batch)
    noisy = batch['target'].clone()
    noisy[0, 0] = noisy[0, 0] - 1 if noisy[0, 0] > Dictionary().nspecial else noisy[0, 0] + 1
    with pytest.raises(ValueError, match=r'the sample of row .* \(1 of \d+ rows differ\).*use --pskd-teacher'):
        criterion(model, {**batch, 'target': noisy})
    criterion(model, batch)


def test_bank_of_160k_sentences_fits():
    """Of 28 tokens each, as IWSLT14 after byte-pair encoding or longer: at most 300 MB."""
    bank = PredictionBank(1, 10000, top_k=8, dtype=torch.float16)
    bank.check_labels(torch.tensor([0]), torch.tensor([7]))
    assert bank.nbytes * 160_000 * 28 < 300e6


def test_a_criterion_that_nobody_trains_is_no_silent_plain_run():
    trainer, batches = make_trainer(['--pskd-teacher', 'snapshot'], **SMALL)
    part = torch.nn.ModuleList([trainer.get_model()])[0]
    trainer.criterion.training_run.step_model = None
    with pytest.raises(RuntimeError, match='trains parts of a model'):
        trainer.criterion(part.train(), batches[0])


def test_old_names_of_options():
    """They work for one minor version, and say the new ones."""
    with pytest.warns(DeprecationWarning, match='fairseq: --pskd-past is now called --pskd-teacher'):
        trainer, _ = make_trainer(['--pskd-past', 'bank'], **SMALL)
    assert trainer.criterion.training_run.cfg.pskd_teacher == 'bank'
    for interval, is_now in (('5', 5), ('0', None)):
        with pytest.warns(DeprecationWarning, match='--pskd-snapshot-interval is now called --pskd-interval'):
            trainer, _ = make_trainer(['--pskd-snapshot-interval', interval], **SMALL)
        assert trainer.criterion.training_run.cfg.pskd_interval == is_now


def test_auto_takes_the_snapshot_and_says_what_does_nothing(caplog):
    with caplog.at_level('INFO'):
        trainer, _ = make_trainer(['--pskd-top-k', '4'], **SMALL)
    assert isinstance(trainer.criterion.training_run.past, SnapshotPast)
    assert "teacher='auto' takes the snapshot: on larger corpora the translations were better" in caplog.text
    assert '--pskd-top-k: is for --pskd-teacher bank, not snapshot: it does nothing' in caplog.text


def test_keep_hard():
    """The label's part weighs 1 instead of 1 - alpha."""
    logs = []
    for option in ([], ['--pskd-keep-hard']):
        trainer, batches = make_trainer(['--pskd-teacher', 'snapshot', *option], **SMALL)
        trainer.criterion.train()
        logs.append(trainer.criterion(trainer.get_model().train(), batches[0])[2])
    mixed, kept = logs
    torch.testing.assert_close(mixed['pskd_hard'], (1 - ALPHA) * kept['pskd_hard'], rtol=1e-3, atol=0)
    assert kept['loss'] == pytest.approx(float(kept['pskd_hard'] + kept['pskd_soft']), rel=1e-5)


@pytest.mark.parametrize(
    ('setting', 'value', 'message'),
    [
        ('ddp_backend', 'fully_sharded', 'use pytorch_ddp or legacy_ddp'),
        ('model_parallel_size', 2, 'leave them out'),
        ('tpu', True, 'common.bf16=true'),
    ],
)
def test_no_process_may_hold_a_part_of_the_model_only(setting, value, message):
    trainer, _ = make_trainer(['--pskd-teacher', 'snapshot'], **SMALL)
    cfg = trainer.cfg.criterion.copy()
    check_config(cfg)
    cfg[setting] = value
    with pytest.raises(ValueError, match=message):
        check_config(cfg)


def test_calibration_gaps_of_batches_add_up():
    probs = torch.rand(60, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    labels = torch.arange(60) % 5
    gaps = sum(calibration_gaps(*confidence_of(p, y)) for p, y in zip(probs.split(25), labels.split(25)))
    assert gaps.abs().sum().item() / 60 == pytest.approx(calibration_error(probs, labels))
