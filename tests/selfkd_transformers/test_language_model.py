"""The experiment on a language model (tools/language_model.py), on a few sentences."""

import gzip

import pytest

pytest.importorskip('transformers', reason='transformers is not installed')
import language_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, 'HALF', 20)
    monkeypatch.setattr(language_model, 'WORDS', 300)
    monkeypatch.setattr(language_model, 'BASE', dict(epochs=1, lr=1e-2, batch=10))
    raw = tmp_path / 'multi30k/data/task1/raw'
    raw.mkdir(parents=True)
    for name, count in (('train', 40), ('val', 5), ('test_2016_flickr', 5)):
        text = ''.join(f'{i} times {i + 1} is {i * (i + 1)}.\n' for i in range(count))
        (raw / f'{name}.en.gz').write_bytes(gzip.compress(text.encode()))
    return tmp_path


@pytest.mark.parametrize('start', ['random', 'trained'])
def test_runs_differ_in_their_method_only(folder, start):
    settings = dict(sentences=20, start=start, epochs=2, lr=1e-2, batch=10)
    plain, same, other = (language_model.run(str(folder), settings, seed) for seed in (0, 0, 1))
    assert (plain['epochs'], plain['measures']) == (same['epochs'], same['measures'])
    assert plain['epochs'] != other['epochs']
    pskd = language_model.run(str(folder), dict(settings, pskd=dict(alpha=0.8)), 0)
    assert pskd['epochs'][0] == plain['epochs'][0]  # there is no past yet
    assert pskd['epochs'][1] != plain['epochs'][1]
    smoothed = language_model.run(str(folder), dict(settings, label_smoothing=0.1), 0)
    assert smoothed['epochs'][0] != plain['epochs'][0]


def test_missing_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='git clone .*multi30k/dataset'):
        language_model.prepare(str(tmp_path))
