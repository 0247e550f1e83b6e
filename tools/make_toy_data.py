"""Writes small data sets of real inputs, for demos and tests.

    python tools/make_toy_data.py digits data/digits --label-noise 0.2
    python tools/make_toy_data.py number-words data/number_words --train-size 4000

digits: scikit-learn's scans of handwritten digits (UCI, 8 x 8 grey), as an image folder
OUT/{train,test}/CLASS/NUMBER.png: 800 training images, 997 test images. With label noise, that share of
the training images lies in the folder of another class, drawn at random; the test labels stay true.

number-words: numbers below a milliard in English and German words, tokenised, OUT/{train,valid,test}.{en,de}:
as many training pairs as asked for, 500 pairs each to validate and to test, no number in two of them.
"""

import argparse
from pathlib import Path

import numpy as np


def digits(out: Path, label_noise: float = 0.0, seed: int = 0, train_size: int = 800) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if not 0 <= label_noise < 1:
        raise SystemExit(f'--label-noise: must lie in [0, 1), got {label_noise}')
    if out.exists():
        raise SystemExit(f'{out} exists already: remove it, or name another folder')
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    split = train_test_split(np.arange(len(images)), train_size=train_size, random_state=0, stratify=data.target)
    rng = np.random.default_rng(seed)
    for part, indices in zip(('train', 'test'), split):
        labels = data.target[indices].copy()
        if part == 'train':
            wrong = rng.permutation(len(labels))[: round(label_noise * len(labels))]
            labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
        for index, label in zip(indices, labels):
            folder = out / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(folder / f'{index:04d}.png')


def number_words(out: Path, train_size: int = 4000, seed: int = 0) -> None:
    from selfkd_fairseq.number_words import write_corpus

    if out.exists():
        raise SystemExit(f'{out} exists already: remove it, or name another folder')
    write_corpus(out, {'train': train_size, 'valid': 500, 'test': 500}, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest='kind', required=True)
    sub = kinds.add_parser('digits', help='an image folder of handwritten digits')
    sub.add_argument('out', type=Path)
    sub.add_argument('--label-noise', type=float, default=0.0, help='share of wrong training labels')
    sub.add_argument('--seed', type=int, default=0, help='which labels are wrong')
    sub = kinds.add_parser('number-words', help='a parallel corpus, English and German')
    sub.add_argument('out', type=Path)
    sub.add_argument('--train-size', type=int, default=4000, help='number of training pairs')
    sub.add_argument('--seed', type=int, default=0, help='of drawing the numbers')
    args = vars(parser.parse_args())
    kind = args.pop('kind')
    {'digits': digits, 'number-words': number_words}[kind](**args)
    print(f'wrote {args["out"]}')


if __name__ == '__main__':
    main()
