"""A parallel corpus from the message catalogues (gettext .mo files) that programs carry their translations in.

The OPUS corpora GNOME, KDE4 and Ubuntu are made of such files. Needs polib.
"""

import random
import re
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from corpora import Pairs, tokenised_pairs

SHORTEST, LONGEST = 3, 25  # words of a message
CODE = 'VAR'  # what every format code becomes
FORMAT_CODE = re.compile(
    r'%%|'
    r'%(?:\(\w+\))?(?:\d+\$)?[-+#0]*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh?|ll?|L|q|j|z|t)?[diouxXeEfFgGaAcsSpn]\b|'  # C
    r'%@|%L?\d+|'  # Cocoa, Qt, KDE
    r'\{\w*(?:[:!][^{}]*)?\}|\$\{\w+\}'  # Python, C#, shell
)
TAG = re.compile(r'</?[A-Za-z][^<>]*>|&(?:[a-z]+|#\d+);')
ACCELERATOR = re.compile(r'\S*[&_~](?=\w)\S*')  # a word marked as in Qt, GTK or LibreOffice


def catalogue_splits(
    folders: Sequence[Path], languages: Tuple[str, str], *, held_out: int = 2000, seed: int = 1
) -> Tuple[Dict[str, Pairs], List[Tuple[str, str, int]]]:
    """Tokenised pairs of messages, split by program.

    Args:
        folders: searched for ``LANGUAGE/LC_MESSAGES/*.mo``; a program is a file name.
        languages: source and target. One is ``en``, the language of the messages' ids.
        held_out: pairs to validate on, and to test on: programs of at most half as many each, drawn at random.
        seed: of the draw.

    Returns:
        the pairs of train, valid and test, and of each program its split and number of pairs.

    Raises:
        ValueError: neither language is ``en``; fewer pairs or programs than are asked for.
    """
    if (languages[0] == 'en') == (languages[1] == 'en'):
        raise ValueError(f'--languages: one of the two must be en, as the ids of messages are; got {languages}')
    programs = read_programs(folders, languages[0] if languages[1] == 'en' else languages[1])
    if languages[1] == 'en':
        programs = {name: [pair[::-1] for pair in pairs] for name, pairs in programs.items()}
    split_of = draw_splits({name: len(pairs) for name, pairs in programs.items()}, held_out, seed)
    splits = {
        split: tokenised_pairs(
            *zip(*(p for name in programs if split_of[name] == split for p in programs[name])), languages
        )
        for split in ('train', 'valid', 'test')
    }
    return splits, [(name, split_of[name], len(pairs)) for name, pairs in programs.items()]


def read_programs(folders: Sequence[Path], language: str) -> Dict[str, Pairs]:
    """Pairs of an English message and its translation, by program; each English message once in all of them."""
    import polib

    files = sorted(path for folder in folders for path in Path(folder).rglob(f'{language}/LC_MESSAGES/*.mo'))
    if not files:
        raise ValueError(f'{", ".join(map(str, folders))}: no {language}/LC_MESSAGES/*.mo was found in it')
    known, programs = set(), {}
    for path in sorted(files, key=lambda path: path.stem):
        if path.is_symlink():
            continue
        for entry in polib.mofile(str(path)):
            pair = normalised(entry.msgid, entry.msgstr)
            if pair and pair[0].lower() not in known:
                known.add(pair[0].lower())
                programs.setdefault(path.stem, []).append(pair)
    return programs


def normalised(message: str, translation: str) -> Optional[Tuple[str, str]]:
    """Both without accelerator marks, and with one word for all format codes; None if the pair is of no use.

    Of use are translated one-line messages of 3 to 25 words without markup, and with equally many format codes.

    Example:
        >>> normalised('_Save %d files to "%s"', '%d Dateien unter „%s“ _speichern')
        ('Save VAR files to "VAR"', 'VAR Dateien unter „VAR“ speichern')
        >>> normalised('Save _as', 'Speichern _unter')  # too short
    """
    sides = [' '.join(text.split()) for text in (message, translation)]
    if message == translation or any('\n' in text.strip() or TAG.search(text) for text in (message, translation)):
        return None
    codes = [FORMAT_CODE.subn(lambda match: '%' if match.group() == '%%' else CODE, side) for side in sides]
    if codes[0][1] != codes[1][1]:
        return None
    sides = [text for text, _ in codes]
    marked = [ACCELERATOR.findall(side) for side in sides]
    if [len(words) for words in marked] == [1, 1] and marked[0] != marked[1]:  # else: names_like_this
        sides = [re.sub(r'[&_~](?=\w)', '', side) for side in sides]
    if not all(SHORTEST <= len(side.split()) <= LONGEST for side in sides):
        return None
    return sides[0], sides[1]


def draw_splits(sizes: Dict[str, int], held_out: int, seed: int) -> Dict[str, str]:
    """Whether a program's messages are in train, valid or test."""
    names = sorted(sizes)
    random.Random(seed).shuffle(names)
    splits = dict.fromkeys(names, 'train')
    for split in ('valid', 'test'):
        total = 0
        for name in names:
            if total < held_out and splits[name] == 'train' and sizes[name] <= held_out / 2:
                splits[name] = split
                total += sizes[name]
        if total < held_out or 'train' not in splits.values():
            raise ValueError(
                f'--held-out {held_out}: the {len(sizes)} programs have {sum(sizes.values())} pairs of messages, too '
                f'few for {split}: give more folders, or hold out less'
            )
    return splits


def drawn_pairs(pairs: Pairs, size: Optional[int] = None, shuffled: float = 0.0, *, seed: int = 1) -> Pairs:
    """A part of a corpus, drawn at random, of which a share of the pairs exchange their targets, as crawled ones may.

    Example:
        >>> pairs = [(f'a{i}', f'b{i}') for i in range(100)]
        >>> drawn = drawn_pairs(pairs, 40, shuffled=0.25)
        >>> len(drawn), sum(a[1:] != b[1:] for a, b in drawn)
        (40, 10)

    Raises:
        ValueError: more pairs asked for than there are, or a share outside [0, 1).
    """
    size = len(pairs) if size is None else size
    if not 1 <= size <= len(pairs):
        raise ValueError(f'--train-size: must lie in [1, {len(pairs)}], the pairs to train on, got {size}')
    if not 0 <= shuffled < 1:
        raise ValueError(f'--shuffled: must lie in [0, 1), got {shuffled}')
    draw = random.Random(seed)
    pairs = draw.sample(pairs, size) if size < len(pairs) else list(pairs)
    wrong = draw.sample(range(size), round(shuffled * size))
    targets = [pairs[i][1] for i in wrong]
    for i, target in zip(wrong, [*targets[1:], *targets[:1]]):  # each gets the next one's
        pairs[i] = (pairs[i][0], target)
    return pairs
