"""Small real segmentation runs; importable by the processes that the tests start."""

from mm_runs import ROOT, counter
from mmcv.transforms import BaseTransform
from mmengine.config import Config, ConfigDict
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


def config(voc, work_dir, *hooks, **options) -> Config:
    """FCN with a narrow ResNet-18, crops of 48 x 48 in batches of 2, 7 iterations, a checkpoint after each."""
    cfg = Config.fromfile(ROOT / 'configs/mmseg/baseline/fcn_r18_digits.py')
    cfg.merge_from_dict(
        {
            'train_dataloader.dataset.data_root': str(voc),
            'val_dataloader.dataset.data_root': str(voc),
            'test_dataloader.dataset.data_root': str(voc),
            'train_dataloader.batch_size': 2,
            'train_cfg.max_iters': 7,
            'train_cfg.val_interval': 100,
            'default_hooks.checkpoint.interval': 1,
            'default_hooks.checkpoint.max_keep_ckpts': 10,
            'model.backbone.base_channels': 8,
            'model.backbone.stem_channels': 8,
            'model.data_preprocessor.size': (48, 48),
            'model.decode_head.in_channels': 64,
            'model.decode_head.dropout_ratio': 0.0,  # draws random numbers, which mmengine does not restore
            'model.auxiliary_head.in_channels': 32,
            'model.auxiliary_head.dropout_ratio': 0.0,
            'work_dir': str(work_dir),
            'experiment_name': f'seg{next(counter)}',
            'log_level': 'ERROR',
        }
    )
    cfg.train_dataloader.dataset.pipeline[2] = dict(type='CenterCrop48')
    cfg.merge_from_dict(options)
    cfg.custom_hooks = [ConfigDict(hook) for hook in hooks]
    return cfg
