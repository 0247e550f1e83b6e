"""Prepares a corpus for fairseq-preprocess: docs/fairseq.md says where the files come from.

python tools/prepare_translation.py iwslt14 data/de-en data/iwslt14
python tools/prepare_translation.py iwslt15 data/en-de data/iwslt15
python tools/prepare_translation.py multi30k data/multi30k/raw data/multi30k
python tools/prepare_translation.py catalogues /usr/share/locale data/messages --languages en de
"""

import argparse
from pathlib import Path

from catalogues import catalogue_splits, drawn_pairs
from corpora import PREPARE, write_splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora = parser.add_subparsers(dest='corpus', required=True, metavar='corpus')
    for name in (*PREPARE, 'catalogues'):
        corpus = corpora.add_parser(name)
        folders = 'searched for LANGUAGE/LC_MESSAGES/*.mo' if name == 'catalogues' else 'the files as distributed'
        corpus.add_argument('raw', type=Path, nargs='+' if name == 'catalogues' else 1, help=folders)
        corpus.add_argument('out', type=Path, help='where {train,valid,test}.LANGUAGE are written')
        corpus.add_argument('--bpe-tokens', type=int, default=10000, help='merges of the joint byte-pair encoding')
    corpus.add_argument('--languages', nargs=2, default=['en', 'de'], help='source and target; one is en')
    corpus.add_argument('--held-out', type=int, default=2000, help='pairs to validate on, and to test on')
    corpus.add_argument('--train-size', type=int, help='pairs to train on, drawn at random (default: all others)')
    corpus.add_argument('--shuffled', type=float, default=0.0, help='share of training pairs that get wrong targets')
    args = parser.parse_args()
    if args.corpus != 'catalogues':
        write_splits(PREPARE[args.corpus](args.raw[0]), args.out, bpe_tokens=args.bpe_tokens)
        return
    splits, programs = catalogue_splits(args.raw, tuple(args.languages), held_out=args.held_out)
    splits['train'] = drawn_pairs(splits['train'], args.train_size, args.shuffled)
    for program, split, pairs in programs:
        print(f'{split}\t{pairs}\t{program}')
    write_splits(splits, args.out, bpe_tokens=args.bpe_tokens, languages=args.languages)


if __name__ == '__main__':
    main()
