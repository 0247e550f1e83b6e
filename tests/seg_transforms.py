"""A transform for the segmentation tests; importable by the processes that they start."""

from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS


@TRANSFORMS.register_module(force=True)  # pytest also imports this file by its path, looking for doctests
class CenterCrop48(BaseTransform):
    """Keeps the middle 48 x 48 pixels: nothing is drawn at random, so runs can be compared."""

    def __init__(self, void=True):
        self.void = void  # whether ignored pixels stay so, or become background

    def transform(self, results):
        if not self.void:
            results['gt_seg_map'][results['gt_seg_map'] == 255] = 0
        for key in ('img', 'gt_seg_map'):
            results[key] = results[key][40:88, 40:88]
        results['img_shape'] = (48, 48)
        return results
