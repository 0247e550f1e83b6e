"""The experiment on translation, on a few sentences."""

import gzip

import pytest
from helpers import ROOT

PARTS = ('train', 'val', 'test_2016_flickr', 'test_2017_flickr')


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    raw = tmp_path / 'multi30k/data/task1/raw'
    raw.mkdir(parents=True)
    for lang, word in (('de', 'Haus'), ('en', 'house')):
        for part in PARTS:
            lines = (f'{i % 7} {word} {i % 3}' for i in range(30))
            (raw / f'{part}.{lang}.gz').write_bytes(gzip.compress('\n'.join(lines).encode()))
    return tmp_path


def test_a_run_measures_both_test_sets_at_the_end_and_earlier(folder):
    import experiments
    import translator

    experiment = experiments.EXPERIMENTS['multi30k']
    settings = {**experiment.settings, **experiment.methods['PS-KD 0.3, bank'], 'epochs': 2}
    found = translator.run(str(folder), settings, 3)
    assert set(found['measures']) == {'last', 'early'}
    for measures in found['measures'].values():
        assert {'bleu', 'chrf', 'nll', 'ece', 'nll_scaled', 'ece_scaled', 'bleu_2017', 'chrf_2017'} <= set(measures)
        assert measures['seed'] == 3
    assert not list(folder.glob('tmp*'))


def test_what_goes_wrong_is_said(folder):
    import translator

    with pytest.raises(RuntimeError, match='invalid choice: .nonsense'):
        translator.run(str(folder), dict(epochs=1, dropout=0, args='--criterion nonsense'), 3)
    (folder / 'multi30k').rename(folder / 'elsewhere')
    with pytest.raises(FileNotFoundError, match='git clone https://github.com/multi30k/dataset'):
        translator.prepare(f'{folder}/elsewhere')
