"""The real fairseq-train with PS-KD, from the first epoch to the checkpoint that other programs read."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.fairseq import USER_DIR

from selfkd.comparison import read_runs

REPO = Path(__file__).resolve().parents[2]
PSKD = '--criterion pskd_label_smoothed_cross_entropy --label-smoothing 0.1 --pskd-alpha 0.8'
PASTS = {
    'snapshot': '',
    'interval': '--pskd-interval 5',
    'ema': '--pskd-teacher ema --store-ema --ema-decay 0.9',
    'bank': '--pskd-teacher bank --pskd-top-k 4',
}
NO_CLOCK = ('wps', 'ups', 'train_wall', 'wall')  # the entries of a log that differ from run to run


def without_clock(entries):
    return [{k: v for k, v in entry.items() if not k.endswith(NO_CLOCK)} for entry in entries]


def test_the_command_of_the_readme(fairseq, tmp_path):
    """A plain shell, the repository as it is cloned, the installed program."""
    program = Path(sys.executable).with_name('fairseq-train')
    options = '--arch lstm --max-tokens 500 --optimizer sgd --max-epoch 2 --cpu --log-format json'
    result = subprocess.run(
        f'{program} {fairseq.folder}/bin --user-dir plugins/selfkd_fairseq --criterion '
        f'pskd_label_smoothed_cross_entropy --pskd-alpha 0.3 {options} --save-dir {tmp_path}',
        shell=True,
        cwd=REPO,
        env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert '"train_pskd_alpha": "0.3"' in result.stdout + result.stderr


def test_usage_shows_the_options(fairseq):
    """fairseq's --help stops before it knows the criterion, for its own options too; its usage message does not."""
    options = (
        '--pskd-alpha',
        '--pskd-teacher {auto,bank,snapshot,ema}',
        '--pskd-interval',
        '--pskd-teacher-mode {train,eval}',
        '--pskd-keep-hard',
        '--pskd-top-k',
        '--pskd-bank-dtype {float32,float16,log8}',
        '--report-ece',
    )
    usage = ' '.join(fairseq.train('usage', PSKD, '--no-such-option', fails=True).split())
    for option in (*options, '--label-smoothing'):
        assert f'[{option}' in usage


@pytest.mark.parametrize('name', ['cross_entropy', 'label_smoothed_cross_entropy'])
def test_alpha_0_is_the_criterion_of_fairseq(fairseq, difference, name):
    """Weights after two epochs with dropout, and every entry of the logs."""
    smoothing = ' --label-smoothing 0.1 --report-accuracy' if name.startswith('label') else ''
    vanilla = fairseq.train(f'v-{name}', f'--criterion {name} --max-epoch 2{smoothing}')
    ours = fairseq.train(f'p-{name}', f'--criterion pskd_{name} --pskd-alpha 0 --max-epoch 2{smoothing}')
    assert difference(fairseq.weights(f'v-{name}'), fairseq.weights(f'p-{name}')) == 0
    for tag in ('train', 'train_inner', 'valid'):
        assert without_clock(ours.stats(tag)) == without_clock(vanilla.stats(tag)) != []


def test_logs(fairseq):
    log = fairseq.train('logs', PSKD, '--max-epoch 4 --report-ece')
    train = log.stats('train')
    # The first epoch has no past; then alpha = 0.8 t / 4.
    assert [entry['train_pskd_alpha'] for entry in train] == pytest.approx([0, 0.4, 0.6, 0.8])
    assert train[0]['train_loss'] == train[0]['train_pskd_hard']
    for entry in train:
        mixed = entry['train_pskd_hard'] + entry['train_pskd_soft']
        assert entry['train_loss'] == pytest.approx(mixed, abs=2e-3)  # logged with three decimals
    for entry in log.stats('valid'):
        assert not any('pskd' in key or 'gap' in key for key in entry)
        assert entry['valid_ppl'] == pytest.approx(2 ** entry['valid_nll_loss'], rel=1e-2)
        assert 0 < entry['valid_ece'] < 100


def test_alpha_grows_with_updates_where_there_is_no_max_epoch(fairseq):
    log = fairseq.train('updates', PSKD, '--max-update 12 --update-freq 2')
    entries = log.stats('train_inner')
    updates = [int(entry['num_updates']) for entry in entries]
    assert updates == list(range(1, 13))
    alphas = [entry['pskd_alpha'] for entry in entries]
    first_epoch = alphas.count(0)
    assert 0 < first_epoch < 6
    # before the u-th update, u - 1 of 12 are done
    assert alphas[first_epoch:] == pytest.approx([0.8 * (u - 1) / 12 for u in updates[first_epoch:]], abs=1e-4)


@pytest.mark.parametrize(
    ('lengths', 'alphas'),
    [('--max-epoch 1000 --max-update 12', None), ('--max-epoch 3 --max-update 1000', [0, 0.8 * 2 / 3, 0.8])],
)
def test_alpha_follows_what_ends_first(fairseq, lengths, alphas):
    log = fairseq.train('first', PSKD, lengths, '--no-save --disable-validation')
    if alphas is None:
        assert log.stats('train_inner')[-1]['pskd_alpha'] == pytest.approx(0.8 * 11 / 12, abs=1e-4)
    else:
        assert [entry['train_pskd_alpha'] for entry in log.stats('train')] == pytest.approx(alphas, abs=1e-4)


def test_what_may_end_training_early_is_said(fairseq):
    log = fairseq.train('patience', PSKD, '--max-epoch 2 --no-save --patience 5')
    assert 'alpha grows up to 0.8 over --max-epoch 2; where --patience ends training earlier' in log


@pytest.mark.parametrize('options', ['', '--sentence-avg'])
def test_cross_entropy_logs_the_likelihood_of_the_label(fairseq, options):
    """As nll_loss and ppl, beside the mixed loss."""
    log = fairseq.train('ce', '--criterion pskd_cross_entropy --pskd-alpha 0.8 --max-epoch 3 --no-save', options)
    last = log.stats('train')[-1]
    tokens = last['train_wpb'] / last['train_bsz'] if options else 1  # the losses are per sentence or per token
    assert last['train_nll_loss'] == pytest.approx(last['train_pskd_hard'] / 0.2 / tokens, abs=2e-2)
    assert abs(last['train_loss'] / tokens - last['train_nll_loss']) > 0.01
    assert last['train_ppl'] == pytest.approx(2 ** last['train_nll_loss'], rel=1e-2)


@pytest.mark.parametrize(('decay', 'says'), [('', True), ('--ema-decay 0.5', False)])
def test_an_average_that_stays_near_the_initial_weights(fairseq, decay, says):
    log = fairseq.train('decay', PSKD, '--max-epoch 2 --no-save --pskd-teacher ema --store-ema', decay)
    assert ('still consists to 100% of the initial weights' in log) == says


def test_validation_is_that_of_the_vanilla_criterion(fairseq):
    """The same checkpoint, validated by both criteria: same loss (smoothed), nll_loss and ppl."""
    fairseq.train('validate', PSKD, '--max-epoch 2')
    path = fairseq.folder / 'validate' / 'checkpoint_last.pt'
    user_dir = REPO / 'plugins' / 'selfkd_fairseq'
    command = f'fairseq-validate bin --task translation --path {path} --max-tokens 500 --cpu --log-format json'
    command += f' --user-dir {user_dir}'  # the vanilla one, too: with torch 2.6 fairseq alone does not load the file
    ours = fairseq.run(command)
    state = fairseq.checkpoint(path)
    state['cfg']['criterion'] = {'_name': 'label_smoothed_cross_entropy', 'label_smoothing': 0.1, 'sentence_avg': False}
    torch.save(state, path)
    vanilla = fairseq.run(command)

    def result(text):
        return json.loads(text[text.rindex('{"') :].splitlines()[0])

    assert result(ours) == result(vanilla)
    assert float(result(ours)['valid_loss']) > 0


def saved_past(state):
    return state['extra_state']['train_iterator']['selfkd']['past']


@pytest.mark.parametrize('past', PASTS)
def test_resuming_is_exact(fairseq, difference, past):
    """From the middle of epoch 2 and from its end, with dropout, the teacher's own too: the weights after epoch 3 are
    the same bit by bit.

    The control shows that what the plugin adds to the checkpoint is what makes them so.
    """
    options = (PSKD, PASTS[past], '--max-epoch 3 --save-interval-updates 4 --disable-validation')
    save = f'{past}-straight'
    fairseq.train(save, *options)
    for name, path in (('middle', fairseq.first(f'{save}/checkpoint_2_*')), ('end', f'{save}/checkpoint2.pt')):
        state = fairseq.checkpoint(path)
        itr = state['extra_state']['train_iterator']
        assert (itr['iterations_in_epoch'] > 0) == (name == 'middle')
        saved = saved_past(state)
        key = {
            'snapshot': ['teacher'] * (name == 'middle'),
            'interval': ['teacher'],
            'ema': ['average'],
            'bank': ['bank'],
        }
        assert list(saved) == key[past]
        plain_file = fairseq.folder / 'plain.pt'
        torch.save(itr['selfkd'], plain_file)
        if torch.__version__ >= '1.13':
            torch.load(plain_file, weights_only=True)
        fairseq.train(f'{past}-{name}', *options, f'--restore-file {fairseq.folder / path}')
        assert difference(fairseq.weights(save), fairseq.weights(f'{past}-{name}')) == 0
        updates = state['optimizer_history'][-1]['num_updates']
        if saved and past != 'ema' and not (past == 'interval' and updates % 5 == 0):  # a new one is due there
            del itr['selfkd']
            torch.save(state, fairseq.folder / save / 'without.pt')
            log = fairseq.train(f'{save}-control', *options, f'--restore-file {save}/without.pt')
            assert difference(fairseq.weights(save), fairseq.weights(f'{save}-control')) > 1e-5
            assert 'PS-KD: the checkpoint holds no past predictions' in log


def test_resuming_with_a_large_bank_beside_the_checkpoints_is_exact(fairseq, difference):
    """Every bank is taken for a large one."""
    folder = fairseq.folder / 'large_banks'
    folder.mkdir()
    (folder / '__init__.py').write_text(
        'import selfkd_fairseq\nfrom selfkd import past_bank\n\npast_bank.LARGE = 1\n', encoding='utf-8'
    )
    options = (PSKD, PASTS['bank'], '--pskd-bank-dtype log8 --max-epoch 3 --save-interval-updates 4')
    options = (*options, '--disable-validation', f'--user-dir {folder}')
    fairseq.train('beside', *options)
    bank = saved_past(fairseq.checkpoint('beside/checkpoint3.pt'))['bank']
    saved = torch.load(bank['file'], weights_only=True)
    assert saved['step'] == bank['step'] == 'epoch 4, batch 0'
    assert (saved['bank']['dtype'], saved['bank']['values'].dtype) == ('log8', torch.uint8)
    *_, last = sorted(fairseq.folder.glob('beside/checkpoint_3_*'), key=lambda path: int(path.stem.split('_')[-1]))
    fairseq.train('beside-resumed', *options, f'--restore-file {last}')
    assert difference(fairseq.weights('beside'), fairseq.weights('beside-resumed')) == 0
    log = fairseq.train(
        'beside-resumed', *options, f'--restore-file {fairseq.folder}/beside/checkpoint1.pt', fails=True
    )
    assert 'the checkpoint is of epoch 2, batch 0, and its bank was saved beside it' in log
    last.parent.rename(fairseq.folder / 'moved')
    fairseq.train('beside-moved', *options, f'--restore-file {fairseq.folder}/moved/{last.name}')
    assert difference(fairseq.weights('beside-resumed'), fairseq.weights('beside-moved')) == 0


def test_the_training_set_may_be_validated_on(fairseq, difference):
    """It is then iterated over twice at a time; the checkpoint in mid-epoch has its snapshot all the same."""
    options = (PSKD, '--max-epoch 3 --valid-subset valid,train --save-interval-updates 4')
    fairseq.train('both', *options)
    path = fairseq.first('both/checkpoint_2_*')
    assert saved_past(fairseq.checkpoint(path))['teacher']
    fairseq.train('both-resumed', *options, f'--restore-file {path}')
    assert difference(fairseq.weights('both'), fairseq.weights('both-resumed')) == 0


@pytest.mark.parametrize(('before', 'after'), [('bank', 'snapshot'), ('snapshot', 'bank'), ('interval', 'ema')])
def test_resuming_with_another_teacher_is_refused(fairseq, before, after):
    options = (PSKD, '--max-epoch 4 --save-interval-updates 4 --disable-validation --store-ema')
    fairseq.train(f'{before}-before', *options, PASTS[before], '--ema-decay 0.9')
    path = fairseq.first(f'{before}-before/checkpoint_2_*')
    resume = f'--ema-decay 0.9 --restore-file {path}'
    log = fairseq.train(f'{before}-{after}', *options, PASTS[after], resume, fails=True)
    made_with = 'snapshot' if before == 'interval' else before
    assert f"past is of teacher='{made_with}', and this run's of teacher='{after}': resume with the same" in log


def test_tied_weights_are_saved_once(fairseq):
    args = (PSKD, '--share-all-embeddings --max-epoch 3')
    fairseq.train('tied', *args, '--save-interval-updates 4', data='joined')
    saved = saved_past(fairseq.checkpoint(fairseq.first('tied/checkpoint_2_*')))['teacher']
    embeddings = [t for name, t in saved.items() if 'embed_tokens' in name or 'output_projection' in name]
    assert len(embeddings) == 3
    assert len({t.storage().data_ptr() for t in embeddings}) == 1


def test_resuming_with_another_total_says_what_happens_to_alpha(fairseq):
    fairseq.train('total', PSKD, '--max-epoch 2')
    log = fairseq.train('total', PSKD, '--max-epoch 4')
    assert 'over --max-epoch 4; the checkpoint was made with --max-epoch 2' in log
    assert [entry['train_pskd_alpha'] for entry in log.stats('train')] == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    ('model', 'data', 'options'),
    [
        ('transformer', 'bin', '--sentence-avg --update-freq 2'),
        ('transformer', 'bin', '--pskd-teacher bank --update-freq 2 --ignore-prefix-size 1 --report-accuracy'),
        ('transformer', 'bin', '--ignore-prefix-size 1 --amp'),
        ('transformer', 'bin', '--pskd-teacher bank --num-workers 2'),
        ('transformer', 'joined', '--share-all-embeddings --store-ema'),
        ('lstm', 'bin', ''),
        ('fconv', 'bin', '--clip-norm 0.1'),
        ('lstm', 'bin', '--pskd-teacher bank --left-pad-target'),
        ('lm', 'lm', '--task language_modeling --tokens-per-sample 16'),
        ('lm', 'lm', '--task language_modeling --tokens-per-sample 16 --pskd-teacher bank --sample-break-mode eos'),
    ],
)
def test_options_and_models(fairseq, model, data, options):
    """Two epochs; the second one learns from the past, and that past is a model that has learnt something."""
    log = fairseq.train('options', PSKD, options, '--max-epoch 3 --no-save --lr 0.01', model=model, data=data)
    first, *_, last = log.stats('train')
    assert first['train_pskd_soft'] == 0 < last['train_pskd_soft']
    assert last['train_pskd_alpha'] == pytest.approx(0.8, abs=0.01)
    assert last['train_nll_loss'] < first['train_nll_loss']


def test_fairseq_hydra_train(fairseq):
    (fairseq.folder / 'conf').mkdir(exist_ok=True)
    (fairseq.folder / 'conf' / 'small.yaml').write_text(
        f"""# @package _group_
common: {{cpu: true, log_format: json, user_dir: {REPO}/plugins/selfkd_fairseq}}
task: {{_name: translation, data: {fairseq.folder}/bin}}
dataset: {{max_tokens: 500}}
optimization: {{max_epoch: 2, lr: [0.01]}}
checkpoint: {{save_dir: {fairseq.folder}/hydra}}
criterion: {{_name: pskd_label_smoothed_cross_entropy, label_smoothing: 0.1, pskd_alpha: 0.6, pskd_teacher: bank}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
model: {{_name: transformer, encoder: {{layers: 1}}, decoder: {{layers: 1}}, base_layers: 0}}
"""
    )
    log = fairseq.run('fairseq-hydra-train --config-dir conf --config-name small')
    assert '"train_pskd_alpha": "0.6"' in log
    assert 'token bank takes' in log


def test_a_user_dir_of_ones_own(fairseq):
    """It imports selfkd_fairseq and registers an architecture beside it; fairseq takes one --user-dir."""
    (fairseq.folder / 'my_project').mkdir()
    (fairseq.folder / 'my_project' / '__init__.py').write_text(
        'import selfkd_fairseq\n'
        'from fairseq.models import register_model_architecture\n\n\n'
        "@register_model_architecture('transformer', 'my_transformer')\n"
        'def small(args):\n'
        '    pass\n'
    )
    own = '--user-dir my_project --arch my_transformer --max-epoch 2'
    log = fairseq.train('own', PSKD, own)
    assert [entry['train_pskd_alpha'] for entry in log.stats('train')] == pytest.approx([0, 0.8])
    assert 'BLEU4 = ' in fairseq.run('fairseq-generate bin --path own/checkpoint_last.pt --cpu --user-dir my_project')
    log = fairseq.train('own-cskd', '--criterion cskd_label_smoothed_cross_entropy', own, '--no-save')
    assert log.stats('train')[-1]['train_loss_cskd'] > 0


alone = pytest.mark.skipif(torch.__version__ >= (2, 6), reason='there fairseq alone loads no checkpoint of its own')


class TestCheckpoints:
    """Programs that read a checkpoint of PS-KD without knowing of it."""

    @pytest.fixture(scope='class')
    def path(self, fairseq):
        fairseq.train('deploy', PSKD, PASTS['bank'], '--max-epoch 2 --save-interval-updates 9 --report-ece')
        return fairseq.folder / 'deploy' / 'checkpoint_last.pt'

    @alone
    def test_fairseq_generate(self, fairseq, path):
        text = fairseq.run(f'fairseq-generate bin --path {path} --cpu --beam 2')
        assert 'BLEU4 = ' in text
        assert text.count('\nH-') == 40

    def test_report_measures_what_fairseqs_programs_do(self, fairseq, path, tmp_path, capsys, monkeypatch):
        from selfkd_fairseq import report

        monkeypatch.chdir(fairseq.folder)
        report.main([str(tmp_path), 'bin', f'plain={path.parent}', f'again={path.parent}'])
        assert '+0.00 one pair, no interval' in capsys.readouterr().out
        (run,) = read_runs(str(tmp_path / 'runs.csv'))['']['again']
        assert run['seed'] == 7
        whole = f'--cpu --required-batch-size-multiple 1 --user-dir {USER_DIR}'
        generated = fairseq.run(f'fairseq-generate bin --path {path} --beam 5 {whole} --remove-bpe --scoring sacrebleu')
        assert run['bleu'] == pytest.approx(float(re.search(r'BLEU = ([\d.]+)', generated)[1]), abs=0.006)
        options = '--task translation --valid-subset test --max-tokens 500 --log-format json'
        validated = fairseq.run(f'fairseq-validate bin --path {path} {options} {whole}')
        found = json.loads(validated[validated.rindex('{"') :].splitlines()[0])
        assert run['nll'] == pytest.approx(float(found['test_nll_loss']), abs=0.002)
        assert 100 * run['ece'] == pytest.approx(float(found['test_ece']), abs=0.002)
        assert run['nll_scaled'] != run['nll']
        assert 0.05 < run['temperature'] < 20

    @alone
    def test_fairseq_interactive(self, fairseq, path):
        text = fairseq.run(f'fairseq-interactive bin --path {path} --cpu --beam 2 --input {fairseq.folder}/test.de')
        assert text.count('\nH-') == 40

    @alone
    def test_from_pretrained_and_strict_loading(self, fairseq, path):
        code = (
            'from fairseq.models.transformer import TransformerModel as M;'
            f"m = M.from_pretrained('{path.parent}', 'checkpoint_last.pt', '{fairseq.folder}/bin');"
            "print(m.translate('w1 w2 w3', beam=2)); import sys; assert 'selfkd' not in sys.modules"
        )
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
        subprocess.run([sys.executable, '-c', code], check=True, env=env, cwd=fairseq.folder)

    @alone
    def test_average_checkpoints(self, fairseq, path):
        """What fairseq's scripts/average_checkpoints.py does: the mean of 'model', everything else from the first."""
        states = [fairseq.checkpoint(f'deploy/checkpoint{epoch}.pt') for epoch in (1, 2)]
        average = {k: sum(state['model'][k].float() for state in states) / 2 for k in states[0]['model']}
        torch.save({**states[0], 'model': average}, path.with_name('average.pt'))
        assert 'BLEU4 = ' in fairseq.run(f'fairseq-generate bin --path {path.with_name("average.pt")} --cpu')


class TestSeveralProcesses:
    @pytest.mark.parametrize('processes', [2, 4])
    @pytest.mark.parametrize('past', ['snapshot', 'bank'])
    def test_processes_are_one_with_update_freq(self, fairseq, difference, past, processes):
        """The same weights: in epochs 2 and 3 each process learns from snapshots and rows that are those of all."""
        one, several = f'one-{past}-{processes}', f'several-{past}-{processes}'
        whole = '--pskd-top-k 28' if past == 'bank' else ''  # the vocabulary: of less, rounding can draw other tokens
        options = (PSKD, PASTS[past], whole, '--max-epoch 3 --dropout 0')
        fairseq.train(one, *options, f'--update-freq {processes}')
        logs = fairseq.train_together(several, *options, '--ddp-backend legacy_ddp', processes=processes)
        assert difference(fairseq.weights(one), fairseq.weights(several)) < 5e-4  # rounding; another past: 0.003
        for log in logs[:1]:
            assert log.stats('train')[-1]['train_pskd_alpha'] == pytest.approx(0.8)
        if past == 'bank':
            one, several = (saved_past(fairseq.checkpoint(f'{save}/checkpoint1.pt'))['bank'] for save in (one, several))
            assert several['seen'].all()  # each process saw a part of the sentences itself
            torch.testing.assert_close(several['values'], one['values'], atol=2e-3, rtol=0)

    def test_progress_with_four(self, fairseq):
        """An epoch has a quarter of the updates, and alpha grows by updates: whichever ends first."""
        options = (PSKD, '--ddp-backend legacy_ddp --no-save --disable-validation')
        logs = fairseq.train_together('four', *options, '--max-epoch 1000 --max-update 8', processes=4)
        epoch = int(logs[0].stats('train')[0]['train_num_updates'])
        alphas = [entry['pskd_alpha'] for entry in logs[0].stats('train_inner')]
        assert alphas == pytest.approx([0] * epoch + [0.8 * done / 8 for done in range(epoch, 8)], abs=1e-4)

    def test_one_process_runs_out_of_memory(self, fairseq):
        """While banks are exchanged, before a checkpoint: fairseq goes on without that batch of its share."""
        options = (PSKD, PASTS['bank'], '--max-epoch 2 --ddp-backend legacy_ddp --disable-validation --update-freq 2')
        logs = fairseq.train_together('memory', *options, '--save-interval-updates 1', out_of_memory_at=2)
        assert 'attempting to recover from OOM' in logs[1]
        first, last = (
            saved_past(fairseq.checkpoint(f'memory/checkpoint{name}.pt'))['bank']['seen'] for name in ('_1_1', '2')
        )
        assert 0 < first.float().mean() < 1
        assert last.all()

    def test_resuming_in_mid_epoch(self, fairseq, difference):
        """Also what the other process predicted since the epoch began has to be in the checkpoint."""
        options = (PSKD, PASTS['bank'], '--max-epoch 3 --ddp-backend legacy_ddp --disable-validation')
        fairseq.train_together('ddp-straight', *options, '--save-interval-updates 5')
        path = fairseq.first('ddp-straight/checkpoint_2_*')
        fairseq.train_together('ddp-resumed', *options, f'--restore-file {path}')
        assert difference(fairseq.weights('ddp-straight'), fairseq.weights('ddp-resumed')) == 0

    def test_pytorch_ddp(self, fairseq, difference):
        options = (PSKD, '--max-epoch 2 --dropout 0')
        # 0.12.2 has parameters for evaluation only, which take no part in training
        fairseq.train_together('pytorch-ddp', *options, '--ddp-backend pytorch_ddp --find-unused-parameters')
        fairseq.train_together('legacy-ddp', *options, '--ddp-backend legacy_ddp')
        assert difference(fairseq.weights('pytorch-ddp'), fairseq.weights('legacy-ddp')) < 1e-5


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--pskd-alpha 1.2 --max-epoch 2', '--pskd-alpha: must lie in [0, 1], got 1.2'),
        ('', '--pskd-alpha: grows until the end of training, so it needs --max-epoch or --max-update'),
        (
            '--max-epoch 2 --pskd-teacher ema',
            '--pskd-teacher ema: uses the average that fairseq keeps, so it needs --store-ema',
        ),
        ('--max-epoch 2 --pskd-interval 0', '--pskd-interval: must be a positive number of updates, got 0'),
        ('--max-epoch 2 --pskd-teacher bank --pskd-top-k 0', '--pskd-top-k: must lie in'),
        ('--max-epoch 2 --pskd-teacher bank --pskd-interval 5', '--pskd-interval: is for --pskd-teacher snapshot, not'),
        (
            '--max-epoch 2 --pskd-teacher bank --pskd-teacher-mode eval',
            '--pskd-teacher-mode: is for --pskd-teacher snapshot or ema, not bank',
        ),
        ('--max-epoch 2 --pskd-teacher snapshot --pskd-top-k 4', '--pskd-top-k: is for --pskd-teacher bank, not snap'),
        (
            '--max-epoch 2 --pskd-past bank --pskd-teacher snapshot',
            '--pskd-past: is the old name of --pskd-teacher, and both were given',
        ),
        ('--max-epoch 1', 'updates (the first epoch) have no past, and training ends after'),
        ('--max-epoch 9 --max-update 3', 'and training ends after 3, so it would be plain: raise --max-epoch or'),
        ('--max-epoch 3 --pskd-interval 100', 'the first 100 updates (--pskd-interval) have no past'),
        ('--max-epoch 1 --pskd-teacher bank', '--pskd-teacher bank: the first'),
        ('--max-epoch 2 --adaptive-softmax-cutoff 10', '--adaptive-softmax-cutoff: an adaptive softmax has no'),
        (
            '--max-epoch 2 --task translation_lev --arch nonautoregressive_transformer',
            'NATransformerModel is not autoregressive',
        ),
    ],
)
def test_what_cannot_work_is_refused(fairseq, options, message):
    log = fairseq.train('refused', '--criterion pskd_label_smoothed_cross_entropy', options, fails=True)
    assert message in log


def test_cskd_refuses_models_that_are_not_autoregressive(fairseq):
    options = '--max-epoch 2 --task translation_lev --arch levenshtein_transformer'
    log = fairseq.train('refused', '--criterion cskd_label_smoothed_cross_entropy', options, fails=True)
    assert 'LevenshteinTransformerModel is not autoregressive' in log


def test_the_bank_refuses_data_that_was_shuffled_between_two_runs(fairseq):
    """Each row would be another token's. The snapshot keeps nothing of single sentences."""
    folder = fairseq.folder
    pairs = list(zip(*((folder / f'train.{language}').read_text().splitlines() for language in ('de', 'en'))))
    random.Random(1).shuffle(pairs)
    for language, lines in zip(('de', 'en'), zip(*pairs)):
        (folder / f'shuffled.{language}').write_text(''.join(f'{line}\n' for line in lines))
    fairseq.run(
        'fairseq-preprocess -s de -t en --trainpref shuffled --validpref valid --destdir shuffled '
        '--srcdict bin/dict.de.txt --tgtdict bin/dict.en.txt'
    )
    for past in ('bank', 'snapshot'):
        options = (PSKD, PASTS[past], '--disable-validation')
        fairseq.train(f'unshuffled-{past}', *options, '--max-epoch 2')
        resume = f'--max-epoch 3 --restore-file {folder}/unshuffled-{past}/checkpoint2.pt'
        log = fairseq.train(f'shuffled-{past}', *options, resume, data='shuffled', fails=past == 'bank')
        says = 'the samples of a batch are not those that the sampler chose'
        assert (says in log) == (past == 'bank')
        assert past != 'bank' or 'or use --pskd-teacher snapshot or ema' in log


def test_sharded_data_is_refused_for_the_bank(fairseq):
    options = (PSKD, '--max-epoch 2 --no-save')
    assert 'join the shards' in fairseq.train('shards', *options, PASTS['bank'], data='bin:bin', fails=True)
    fairseq.train('shards', *options, data='bin:bin')


def test_cskd(fairseq):
    options = '--label-smoothing 0.1 --max-epoch 2'
    criterion = '--criterion cskd_label_smoothed_cross_entropy'
    log = fairseq.train('cskd', criterion, options, '--cskd-temperature 2')
    assert log.stats('train')[-1]['train_loss_cskd'] > 0
    assert not any('cskd' in key for key in log.stats('valid')[-1])
    assert '--cskd-temperature must be above 0' in fairseq.train(
        'cskd-bad', criterion, options, '--cskd-temperature 0', fails=True
    )
