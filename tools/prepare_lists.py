"""Writes the lists of training and test images (`PATH CLASS-ID` lines) that our configs read, from a data set's own
files.

    python tools/prepare_lists.py tinyimagenet data/tiny-imagenet-200
    python tools/prepare_lists.py dogs data/stanford_dogs
    python tools/prepare_lists.py mit67 data/mit67
    python tools/prepare_lists.py stanford40 data/stanford40

The folder is the data set as its authors hand it out, unpacked (docs/data.md). No image is read or moved.
"""

import argparse
from pathlib import Path

from selfkd.files import replacing


def write(path: Path, lines) -> None:
    with replacing(path) as beside:
        beside.write_text(''.join(f'{image} {label}\n' for image, label in lines))
    print(f'wrote {path}')


def tinyimagenet(root: Path) -> None:
    classes = sorted(folder.name for folder in (root / 'train').iterdir())
    ids = {name: i for i, name in enumerate(classes)}
    images = ((image, name) for name in classes for image in sorted((root / 'train' / name).rglob('*.JPEG')))
    write(root / 'train.txt', ((image.relative_to(root / 'train'), ids[name]) for image, name in images))
    rows = (line.split('\t') for line in (root / 'val/val_annotations.txt').read_text().splitlines())
    write(root / 'val.txt', ((row[0], ids[row[1]]) for row in rows))


def dogs(root: Path) -> None:
    from scipy.io import loadmat

    for part in ('train', 'test'):
        lists = loadmat(str(root / f'{part}_list.mat'))
        names = (str(cell[0]) for cell in lists['file_list'][:, 0])
        write(root / f'{part}.txt', zip(names, (int(label) - 1 for label in lists['labels'][:, 0])))


def mit67(root: Path) -> None:
    parts = {part: (root / f'{part.title()}Images.txt').read_text().split() for part in ('train', 'test')}
    classes = sorted({name.split('/')[0] for name in parts['train']})
    for part, names in parts.items():
        write(root / f'{part}.txt', ((name, classes.index(name.split('/')[0])) for name in names))


def stanford40(root: Path) -> None:
    splits = root / 'ImageSplits'
    classes = sorted(path.name[: -len('_train.txt')] for path in splits.glob('*_train.txt'))
    for part in ('train', 'test'):
        names = ((name, i) for i, c in enumerate(classes) for name in (splits / f'{c}_{part}.txt').read_text().split())
        write(root / f'{part}.txt', names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {'tinyimagenet': tinyimagenet, 'dogs': dogs, 'mit67': mit67, 'stanford40': stanford40}
    parser.add_argument('dataset', choices=list(kinds))
    parser.add_argument('folder', type=Path)
    args = parser.parse_args()
    kinds[args.dataset](args.folder)


if __name__ == '__main__':
    main()
