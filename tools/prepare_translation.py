"""Prepares IWSLT or Multi30k for fairseq-preprocess: docs/translation.md says where the files come from.

python tools/prepare_translation.py iwslt14 data/de-en data/iwslt14
python tools/prepare_translation.py iwslt15 data/en-de data/iwslt15
python tools/prepare_translation.py multi30k data/multi30k/raw data/multi30k
"""

import argparse
from pathlib import Path

from selfkd_fairseq.prepare import PREPARE, write_splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('corpus', choices=PREPARE)
    parser.add_argument('raw', type=Path, help='the unpacked files as they are distributed')
    parser.add_argument('out', type=Path, help='where {train,valid,test}.{de,en} are written')
    parser.add_argument('--bpe-tokens', type=int, default=10000, help='merges of the joint byte-pair encoding')
    args = parser.parse_args()
    write_splits(PREPARE[args.corpus](args.raw), args.out, bpe_tokens=args.bpe_tokens)


if __name__ == '__main__':
    main()
