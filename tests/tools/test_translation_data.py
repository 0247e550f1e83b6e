"""Preparing corpora, and the configs that go with them, on miniatures of the real file layouts."""

import gzip
import subprocess
import sys

import pytest
from helpers import ROOT

CONFIGS = f'{ROOT}/configs/fairseq'
USER_DIR = f'common.user_dir={ROOT}/plugins/selfkd_fairseq'
SENTENCES = [('Das ist ein Haus.', 'This is a house.'), ('„Gut“, sagte er.', '"Good", he said.'), ('Ja!', 'Yes!')]


def tool(name, *args, **kwargs):
    command = [sys.executable, str(ROOT / 'tools' / name), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True, **kwargs)


def write_tags(folder, lang, lines):
    head = '<url>http://x</url>\n<talkid>1</talkid>\n<keywords>a, b</keywords>\n'
    text = head + f'<title>{lines[0]}</title>\n<description>{lines[1]}</description>\n' + '\n'.join(lines[2:]) + '\n'
    (folder / f'train.tags.de-en.{lang}').write_text(text)


def write_xml(path, lines):
    segments = ''.join(f'<seg id="{i}"> {line} </seg>\n' for i, line in enumerate(lines, 1))
    path.write_text(f'<?xml version="1.0"?>\n<doc docid="1">\n<url>http://x</url>\n{segments}</doc>\n')


@pytest.fixture
def iwslt(tmp_path):
    """70 training pairs, and the dev and test sets of both years."""
    raw = tmp_path / 'de-en'
    raw.mkdir()
    for side, lang in enumerate(('de', 'en')):
        write_tags(raw, lang, [SENTENCES[i % 3][side] for i in range(70)])
        for year in ('IWSLT14', 'IWSLT15'):
            for name in ('TED.dev2010', 'TEDX.dev2012', 'TED.tst2010', 'TED.tst2011', 'TED.tst2012', 'TED.tst2013'):
                if year == 'IWSLT14' or name in ('TED.tst2013', 'TED.tst2012'):
                    path = raw / f'{year}.{name}.de-en.{lang}.xml'
                    write_xml(path, [pair[side] for pair in SENTENCES])
    return raw


def test_iwslt14(iwslt, tmp_path, fairseq):
    for path in iwslt.glob('IWSLT15*'):
        path.unlink()
    out = tmp_path / 'out'
    tool('prepare_translation.py', 'iwslt14', iwslt, out, '--bpe-tokens', 30)
    lines = {name: (out / name).read_text().splitlines() for name in ('train.de', 'train.en', 'valid.de', 'test.en')}
    assert [len(lines[n]) for n in ('train.de', 'train.en', 'valid.de', 'test.en')] == [67, 67, 3, 15]
    text = ' '.join(lines['train.en']).replace('@@ ', '')
    assert text.startswith('this is a house . &quot; good &quot; , he said . yes !')
    run_config(fairseq, out, 'iwslt14', 'de', 'en')


def test_iwslt15(iwslt, tmp_path):
    for path in iwslt.glob('IWSLT14*'):
        path.unlink()
    out = tmp_path / 'out'
    tool('prepare_translation.py', 'iwslt15', iwslt, out, '--bpe-tokens', 30)
    assert [len((out / f'{s}.de').read_text().splitlines()) for s in ('train', 'valid', 'test')] == [70, 3, 3]


def test_multi30k(tmp_path, fairseq):
    raw, out = tmp_path / 'raw', tmp_path / 'out'
    raw.mkdir()
    for side, lang in enumerate(('de', 'en')):
        for name, times in (('train', 20), ('val', 1), ('test_2016_flickr', 2)):
            with gzip.open(raw / f'{name}.{lang}.gz', 'wt', encoding='utf-8') as f:
                f.write(''.join(pair[side] + '\n' for pair in SENTENCES * times))
    tool('prepare_translation.py', 'multi30k', raw, out, '--bpe-tokens', 30)
    assert [len((out / f'{s}.en').read_text().splitlines()) for s in ('train', 'valid', 'test')] == [60, 3, 6]
    run_config(fairseq, out, 'multi30k', 'en', 'de')


@pytest.fixture
def catalogues(tmp_path):
    """Twelve programs with 10 to 21 messages each, and one message that all of them have."""
    polib = pytest.importorskip('polib')
    folder = tmp_path / 'locale' / 'de' / 'LC_MESSAGES'
    folder.mkdir(parents=True)
    for program in range(12):
        catalogue = polib.POFile()
        catalogue.metadata = {'Content-Type': 'text/plain; charset=UTF-8'}
        messages = [('Could not open the file', 'Datei nicht zu öffnen gewesen')]
        messages += [
            (f'{program} _opens file {i} of %s', f'{program} öffnet _Datei {i} von %s') for i in range(10 + program)
        ]
        for message, translation in messages:
            catalogue.append(polib.POEntry(msgid=message, msgstr=translation))
        catalogue.save_as_mofile(str(folder / f'program{program}.mo'))
    (folder / 'symlink.mo').symlink_to(folder / 'program3.mo')
    return tmp_path / 'locale'


@pytest.mark.parametrize('languages', [('en', 'de'), ('de', 'en')])
def test_catalogues(catalogues, tmp_path, languages):
    """Splits by program that have no English message in common, and an account of what came from where."""
    options = ['--bpe-tokens', 30, '--held-out', 30, '--languages', *languages]
    said = tool('prepare_translation.py', 'catalogues', catalogues, tmp_path / 'out', *options).stdout
    rows = [line.split('\t') for line in said.splitlines() if '\t' in line]
    assert len(rows) == 12
    assert sum(int(pairs) for _, pairs, _ in rows) == sum(range(10, 22)) + 1  # the message of all of them: once
    programs = {}
    for split in ('train', 'valid', 'test'):
        english, german = (
            (tmp_path / 'out' / f'{split}.{lang}').read_text().replace('@@ ', '').splitlines() for lang in ('en', 'de')
        )
        assert len(english) == len(german) == sum(int(pairs) for where, pairs, _ in rows if where == split) >= 30
        programs[split] = {line.split()[0] for line in english if 'opens' in line}
        assert programs[split] <= {name.replace('program', '') for where, _, name in rows if where == split}
        for a, b in zip(english, german):
            if 'opens' in a:
                number, i = a.split()[0], a.split()[3]
                assert (a, b) == (f'{number} opens file {i} of var', f'{number} öffnet datei {i} von var')
    assert sum(map(len, programs.values())) == 12


def test_fewer_pairs_and_wrong_targets(catalogues, tmp_path):
    for out, options in (
        ('all', ()),
        ('few', ('--train-size', 60)),
        ('wrong', ('--train-size', 60, '--shuffled', 0.25)),
    ):
        options = ['--bpe-tokens', 30, '--held-out', 30, *options]
        tool('prepare_translation.py', 'catalogues', catalogues, tmp_path / out, *options)
    pairs = {
        (out, split): list(
            zip(
                *(
                    (tmp_path / out / f'{split}.{lang}').read_text().replace('@@ ', '').splitlines()
                    for lang in ('en', 'de')
                )
            )
        )
        for out in ('all', 'few', 'wrong')
        for split in ('train', 'test')
    }
    assert pairs['few', 'test'] == pairs['wrong', 'test'] == pairs['all', 'test']
    assert len(pairs['few', 'train']) == len(pairs['wrong', 'train']) == 60
    assert set(pairs['few', 'train']) < set(pairs['all', 'train'])
    moved = [(a, b) for a, b in zip(pairs['few', 'train'], pairs['wrong', 'train']) if a != b]
    assert len(moved) == 15
    assert all(a[0] == b[0] for a, b in moved)
    assert sorted(a[1] for a, _ in moved) == sorted(b[1] for _, b in moved)


def test_the_config_for_catalogues(catalogues, tmp_path, fairseq):
    """The commands of docs/fairseq.md."""
    text = tmp_path / 'out'
    tool('prepare_translation.py', 'catalogues', catalogues, text, '--bpe-tokens', 30, '--held-out', 30)
    prefixes = ' '.join(f'--{split}pref {text}/{split}' for split in ('train', 'valid', 'test'))
    fairseq.run(f'fairseq-preprocess -s en -t de {prefixes} --joined-dictionary --destdir {text}/bin')
    log = fairseq.run(
        f'fairseq-hydra-train --config-dir {CONFIGS} --config-name messages {USER_DIR} task.data={text}/bin '
        f'checkpoint.save_dir={text}/run common.log_format=json optimization.max_epoch=2'
    )
    assert '"train_pskd_alpha": "0.3"' in log
    assert '"valid_ece"' in log


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--held-out', 100], '--held-out 100: the 12 programs have 187 pairs of messages, too few'),
        (['--held-out', 30, '--train-size', 500], '--train-size: must lie in [1, '),
        (['--held-out', 30, '--shuffled', 1.0], '--shuffled: must lie in [0, 1), got 1.0'),
        (['--languages', 'en', 'fr'], 'no fr/LC_MESSAGES/*.mo was found'),
        (['--languages', 'de', 'fr'], '--languages: one of the two must be en'),
    ],
)
def test_catalogues_that_are_refused(catalogues, tmp_path, options, message):
    with pytest.raises(subprocess.CalledProcessError) as error:
        tool('prepare_translation.py', 'catalogues', catalogues, tmp_path / 'out', *options)
    assert message in error.value.stderr


@pytest.mark.parametrize(
    ('message', 'translation', 'expected'),
    [
        ('&Save the %1 now', '%1 jetzt &speichern gleich', ('Save the VAR now', 'VAR jetzt speichern gleich')),
        ('Set my_name to %(x)s', 'Setze my_name auf {x}', ('Set my_name to VAR', 'Setze my_name auf VAR')),
        ('100%% of 20 % is here', '100%% von 20 % sind da', ('100% of 20 % is here', '100% von 20 % sind da')),
        ('Lost %d of %d', 'Zwei von %d verloren', None),  # another number of codes
        ('Two lines\nof a message', 'Zwei Zeilen\neiner Meldung', None),
        ('The <b>bold</b> one here', 'Das <b>fette</b> da hinten', None),
        ('Copyright by the authors', 'Copyright by the authors', None),  # not translated
        ('Copyright by the authors', '', None),
        ('word ' * 26, 'Wort ' * 25, None),
    ],
)
def test_messages_are_normalised(message, translation, expected):
    from catalogues import normalised

    assert normalised(message, translation) == expected


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        tool('prepare_translation.py', 'multi30k', tmp_path, tmp_path / 'out')
    assert 'train.de*: expected one such file, found 0' in error.value.stderr


def run_config(fairseq, text, name, source, target):
    """The commands of docs/fairseq.md with configs/fairseq/iwslt.yaml, on a smaller model and the CPU."""
    prefixes = ' '.join(f'--{split}pref {text}/{split}' for split in ('train', 'valid', 'test'))
    fairseq.run(f'fairseq-preprocess -s {source} -t {target} {prefixes} --destdir {text}/bin')
    small = 'model.encoder.layers=1 model.decoder.layers=1 model.encoder.embed_dim=32 model.decoder.embed_dim=32'
    log = fairseq.run(
        f'fairseq-hydra-train --config-dir {CONFIGS} --config-name iwslt {USER_DIR} task.data={text}/bin '
        f'task.source_lang={source} task.target_lang={target} checkpoint.save_dir={text}/run {small} '
        'common.fp16=false common.cpu=true common.log_format=json optimization.max_epoch=2'
    )
    assert '"train_pskd_alpha": "0.7"' in log
    assert '"valid_bleu"' in log
    path = f'{text}/run/checkpoint_best.pt'
    assert 'BLEU4 = ' in fairseq.run(
        f'fairseq-generate {text}/bin --path {path} --cpu --beam 5 --remove-bpe --required-batch-size-multiple 1'
    )


def test_number_words(tmp_path, fairseq):
    """Disjoint splits, a test set that does not depend on the training set, and a config that learns them."""
    from number_words import write_corpus

    write_corpus(tmp_path, {'train': 200, 'valid': 20, 'test': 50}, seed=3)
    lines = {split: (tmp_path / f'{split}.de').read_text().splitlines() for split in ('train', 'valid', 'test')}
    assert len(set(sum(lines.values(), []))) == 270
    write_corpus(tmp_path / 'small', {'train': 20, 'valid': 20, 'test': 50}, seed=3)
    assert (tmp_path / 'small' / 'test.en').read_text() == (tmp_path / 'test.en').read_text()
    with pytest.raises(ValueError, match='there are 100 numbers'):
        write_corpus(tmp_path, {'train': 101}, largest=99)

    prefixes = ' '.join(f'--{split}pref {tmp_path}/{split}' for split in lines)
    fairseq.run(f'fairseq-preprocess -s en -t de {prefixes} --destdir {tmp_path}/bin')
    log = fairseq.run(
        f'fairseq-hydra-train --config-dir {CONFIGS} --config-name number_words {USER_DIR} task.data={tmp_path}/bin '
        f'checkpoint.save_dir={tmp_path}/run common.log_format=json optimization.max_epoch=12 '
        'lr_scheduler.warmup_updates=1'
    )
    nll = [
        float(line.split('"valid_nll_loss": "')[1].split('"')[0])
        for line in log.splitlines()
        if 'valid_nll_loss' in line
    ]
    assert nll[-1] < 0.75 * nll[0]
