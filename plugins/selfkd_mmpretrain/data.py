"""What the papers' experiments take from their data that MMPretrain has not: PS-KD's colour jitter, and SVHN."""

from pathlib import Path
from typing import List

import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS, TRANSFORMS

__all__ = ['SVHN', 'FloatColorJitter']

GREY = np.array([0.114, 0.587, 0.299], dtype=np.float32)  # of blue, green, red


@TRANSFORMS.register_module()
class FloatColorJitter(BaseTransform):
    """Brightness, contrast and saturation, each times a factor from U(1 - x, 1 + x), in random order, without rounding
    or clipping.

    PS-KD's augmentation for ImageNet, as released. ``img`` ``[H, W, 3]`` in BGR order, of any dtype, becomes float32
    and may leave [0, 255]: what follows must take that (``Lighting`` and ``PackInputs`` do).

    Args:
        brightness, contrast, saturation: x of each, at least 0.
    """

    def __init__(self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0):
        self.strengths = dict(brightness=brightness, contrast=contrast, saturation=saturation)
        for name, strength in self.strengths.items():
            if strength < 0:
                raise ValueError(f'FloatColorJitter: {name} must be at least 0, got {strength}')

    @cache_randomness
    def _draw(self) -> list:
        names = np.random.permutation(list(self.strengths))
        return [(name, np.random.uniform(1 - self.strengths[name], 1 + self.strengths[name])) for name in names]

    def transform(self, results: dict) -> dict:
        img = results['img'].astype(np.float32)
        for name, factor in self._draw():
            grey = (img @ GREY)[..., None]
            other = {'brightness': np.float32(0), 'contrast': grey.mean(dtype=np.float64), 'saturation': grey}[name]
            img = (other + factor * (img - other)).astype(np.float32)
        results['img'] = img
        return results

    def __repr__(self) -> str:
        return f'FloatColorJitter({", ".join(f"{k}={v}" for k, v in self.strengths.items())})'


@DATASETS.register_module()
class SVHN(BaseDataset):
    """Street View House Numbers, cropped 32 x 32 digits: 26,032 test images in RGB order, as MMPretrain's CIFAR10.

    Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", NeurIPS workshop 2011
    http://ufldl.stanford.edu/housenumbers/

    Args:
        data_root: folder with ``test_32x32.mat``.
        split: ``'train'``, ``'test'`` or ``'extra'``: which of the three files to read.
        kwargs: of MMEngine's ``BaseDataset``.
    """

    METAINFO = {'classes': tuple('0123456789')}

    def __init__(self, data_root: str, split: str = 'test', **kwargs):
        if split not in ('train', 'test', 'extra'):
            raise ValueError(f"SVHN: split must be 'train', 'test' or 'extra', got {split!r}")
        self.split = split
        super().__init__(ann_file='', data_root=data_root, **kwargs)

    def load_data_list(self) -> List[dict]:
        from scipy.io import loadmat

        path = Path(self.data_root) / f'{self.split}_32x32.mat'
        if not path.exists():
            raise FileNotFoundError(f'SVHN: {path} is missing; docs/data.md says where to get it')
        content = loadmat(str(path))  # X [32, 32, 3, N]; the digit 0 has the label 10
        images, labels = content['X'].transpose(3, 0, 1, 2), content['y'].ravel() % 10
        return [{'img': image, 'gt_label': int(label)} for image, label in zip(np.ascontiguousarray(images), labels)]
