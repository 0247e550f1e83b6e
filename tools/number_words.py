"""A parallel corpus of real language without end: numbers in words, English and German.

German puts the units before the tens and writes a number as one word, so translating takes reordering. German
compounds are split into the words they are made of: ``vier und achtzig tausend fünf hundert``.
"""

import random
import re
from pathlib import Path
from typing import Dict

from selfkd.files import replacing

GERMAN_PARTS = (
    *(
        'millionen',
        'million',
        'hundert',
        'tausend',
        'und',
        'null',
        'eins',
        'eine',
        'ein',
        'zwei',
        'drei',
        'vier',
        'fünf',
    ),
    *('sechs', 'sech', 'sieben', 'sieb', 'acht', 'neun', 'zehn', 'elf', 'zwölf'),
    *('zwanzig', 'dreißig', 'vierzig', 'fünfzig', 'sechzig', 'siebzig', 'achtzig', 'neunzig'),
)
GERMAN_PART = re.compile('|'.join(sorted(GERMAN_PARTS, key=len, reverse=True)))


def english(number: int) -> str:
    """
    Example:
        >>> english(84527)
        'eighty - four thousand , five hundred and twenty - seven'
    """
    from num2words import num2words

    return ' '.join(re.findall(r'\w+|[^\w\s]', num2words(number, lang='en')))


def german(number: int) -> str:
    """
    Example:
        >>> german(84527)
        'vier und achtzig tausend fünf hundert sieben und zwanzig'
    """
    from num2words import num2words

    word = num2words(number, lang='de').replace(' ', '').lower()
    parts = GERMAN_PART.findall(word)
    if ''.join(parts) != word:
        raise ValueError(f'number: {word!r} has parts that are not known; numbers below a milliard are')
    return ' '.join(parts)


def write_corpus(folder, sizes: Dict[str, int], *, largest: int = 999_999_999, seed: int = 0) -> None:
    """Writes ``folder/{split}.{en,de}``, one tokenised sentence a line.

    No number is in two splits. The test and valid sets do not depend on the size of the training set.

    Args:
        folder: made if missing.
        sizes: number of sentence pairs of each split.
        largest: numbers are drawn uniformly from 0 to this one.
        seed: of the drawing.
    """
    if sum(sizes.values()) > largest + 1:
        raise ValueError(f'sizes: {sum(sizes.values())} pairs were asked for, there are {largest + 1} numbers')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(seed).sample(range(largest + 1), sum(sizes.values()))
    for split in sorted(sizes, key=lambda name: name == 'train'):
        part, numbers = numbers[: sizes[split]], numbers[sizes[split] :]
        for language, words in (('en', english), ('de', german)):
            text = ''.join(words(number) + '\n' for number in part)
            with replacing(folder / f'{split}.{language}') as beside:
                beside.write_text(text, encoding='utf-8')
