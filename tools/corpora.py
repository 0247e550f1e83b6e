"""Turns IWSLT and Multi30k as they are distributed into tokenised text with byte-pair encoding, German and English.

Moses tokenisation, lower case, a joint byte-pair encoding learnt on the training text; the splits that results on these
corpora are usually reported for. Needs sacremoses and subword-nmt.
"""

import gzip
import re
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from selfkd.files import replacing

LANGUAGES = ('de', 'en')
MARKUP_LINE = re.compile(r'<(url|talkid|keywords|speaker|reviewer|translator|doc|/doc)')
TAG = re.compile(r'</?(title|description)>')
SEGMENT = re.compile(r'<seg id="\d+">(.*)</seg>')
Pairs = List[Tuple[str, str]]


def iwslt14(raw: Path) -> Dict[str, Pairs]:
    """IWSLT 2014 de-en: every 23rd training pair validates; dev2010, dev2012 and tst2010 to tst2012 test."""
    train = tokenised_pairs(*(training_lines(find(raw, f'train.tags.*.{lang}')) for lang in LANGUAGES))
    train = [pair for pair in train if well_formed(pair)]
    tests = ('TED.dev2010', 'TEDX.dev2012', 'TED.tst2010', 'TED.tst2011', 'TED.tst2012')
    return {
        'train': [pair for i, pair in enumerate(train, 1) if i % 23],
        'valid': train[22::23],
        'test': [pair for test in tests for pair in segment_pairs(raw, test)],
    }


def iwslt15(raw: Path) -> Dict[str, Pairs]:
    """IWSLT 2015 en-de (or de-en): validates on tst2012, tests on tst2013."""
    train = tokenised_pairs(*(training_lines(find(raw, f'train.tags.*.{lang}')) for lang in LANGUAGES))
    return {
        'train': [pair for pair in train if well_formed(pair)],
        'valid': segment_pairs(raw, 'TED.tst2012'),
        'test': segment_pairs(raw, 'TED.tst2013'),
    }


def multi30k(raw: Path) -> Dict[str, Pairs]:
    """Multi30k, task 1: tests on test_2016_flickr."""
    names = {'train': 'train', 'valid': 'val', 'test': 'test_2016_flickr'}
    return {
        split: tokenised_pairs(*(read_lines(find(raw, f'{name}.{lang}*')) for lang in LANGUAGES))
        for split, name in names.items()
    }


PREPARE = {'iwslt14': iwslt14, 'iwslt15': iwslt15, 'multi30k': multi30k}


def write_splits(
    splits: Dict[str, Pairs], out: Path, *, bpe_tokens: int = 10000, languages: Sequence[str] = LANGUAGES
) -> None:
    """Learns the encoding (``out/code``) and writes ``out/{split}.{language}``."""
    from subword_nmt.apply_bpe import BPE
    from subword_nmt.learn_bpe import learn_bpe

    for split, pairs in splits.items():
        if not pairs:
            raise ValueError(f'{split}: no sentence pairs were found')
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / 'code') as beside, open(beside, 'w', encoding='utf-8') as code:
        learn_bpe([text for side in zip(*splits['train']) for text in side], code, bpe_tokens)
    with open(out / 'code', encoding='utf-8') as code:
        bpe = BPE(code)
    for split, pairs in splits.items():
        for lang, lines in zip(languages, zip(*pairs)):
            text = ''.join(bpe.process_line(line) + '\n' for line in lines)
            with replacing(out / f'{split}.{lang}') as beside:
                beside.write_text(text, encoding='utf-8')
        print(f'{out}/{split}: {len(pairs)} pairs')


def find(raw: Path, pattern: str) -> Path:
    found = sorted(Path(raw).glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f'{raw}/{pattern}: expected one such file, found {len(found)}')
    return found[0]


def read_lines(path: Path) -> List[str]:
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8') as lines:
        return [line.strip() for line in lines]


def training_lines(path: Path) -> List[str]:
    """The text of a train.tags file: talks with their titles and descriptions, without their other markup."""
    return [TAG.sub('', line).strip() for line in read_lines(path) if not MARKUP_LINE.match(line)]


def segment_pairs(raw: Path, test: str) -> Pairs:
    """The sentences of a dev or test set, IWSLT*.{test}.*.{lang}.xml."""
    sides = []
    for lang in LANGUAGES:
        matches = map(SEGMENT.match, read_lines(find(raw, f'IWSLT*.{test}.*.{lang}.xml')))
        sides.append([match.group(1).strip().replace('’', "'") for match in matches if match])
    return tokenised_pairs(*sides)


def tokenised_pairs(first: Sequence[str], second: Sequence[str], languages: Sequence[str] = LANGUAGES) -> Pairs:
    from sacremoses import MosesTokenizer

    if len(first) != len(second):
        raise ValueError(
            f'the text in {languages[0]} has {len(first)} lines, that in {languages[1]} {len(second)}: they do not '
            'correspond'
        )
    sides = []
    for lang, lines in zip(languages, (first, second)):
        tokenizer = MosesTokenizer(lang=lang)
        sides.append([tokenizer.tokenize(line, return_str=True).lower() for line in lines])
    return list(zip(*sides))


def well_formed(pair: Tuple[str, str], shortest: int = 1, longest: int = 175, ratio: float = 1.5) -> bool:
    """Moses' clean-corpus: lengths in tokens within limits, and not too different."""
    a, b = (len(side.split()) for side in pair)
    return min(a, b) >= shortest and max(a, b) <= longest and max(a, b) <= ratio * min(a, b)
