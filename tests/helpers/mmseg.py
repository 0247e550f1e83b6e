"""Small real segmentation runs; importable by the processes that the tests start."""

from mmcv.transforms import BaseTransform
from mmengine.config import Config, ConfigDict
from mmseg.registry import TRANSFORMS

from helpers import ROOT
from helpers.mmengine import place


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


MAPS = [8, 16, 32, 64]  # channels of the narrow ResNet-18
BASES = {  # models of MMSegmentation's own, and the channels of the maps that reach their decode heads
    'fcn_r50-d8': MAPS,
    'pspnet_r50-d8': MAPS,
    'deeplabv3plus_r50-d8': MAPS,
    'upernet_r50': MAPS,
    'fpn_r50': [16] * 4,
    'segformer_mit-b0': [8, 16, 40, 64],
}


def tiny(base):
    """A model of MMSegmentation's ``_base_/models`` as it is but for its size, and for dropout, whose random numbers
    mmengine does not restore."""
    path, _ = Config._get_cfg_path(f'mmseg::_base_/models/{base}.py', '')
    model = Config.fromfile(path).model
    model.pretrained = None
    heads = [model[name] for name in ('decode_head', 'auxiliary_head') if name in model]
    if 'segformer' in base:
        model.backbone.update(embed_dims=8, num_layers=[1] * 4, drop_path_rate=0.0)
        model.decode_head.in_channels = BASES[base]
    else:
        model.backbone.update(depth=18, base_channels=8, stem_channels=8, norm_cfg=dict(type='BN'))
        for head in heads:
            wide = head.in_channels
            head.in_channels = [c // 32 for c in wide] if isinstance(wide, list) else wide // 32
        if 'c1_in_channels' in model.decode_head:
            model.decode_head.update(c1_in_channels=8, c1_channels=4)
        if 'neck' in model:
            model.neck.update(in_channels=MAPS, out_channels=16)
            model.decode_head.in_channels = BASES[base]
    for head in heads:
        head.update(channels=16, norm_cfg=dict(type='BN'), num_classes=11, dropout_ratio=0.0)
    model.data_preprocessor.update(size=(48, 48), test_cfg=dict(size_divisor=32))
    return model


def config(voc, work_dir, *hooks, base='fcn_r50-d8', **options) -> Config:
    """A tiny model, crops of 48 x 48 in batches of 2, 7 iterations, a checkpoint after each."""
    cfg = Config.fromfile(ROOT / 'configs/mmseg/_base_/voc_digits.py')
    cfg.model = tiny(base)
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4))
    cfg.merge_from_dict(
        {
            'train_dataloader.batch_size': 2,
            'train_cfg.max_iters': 7,
            'train_cfg.val_interval': 100,
            'default_hooks.checkpoint.interval': 1,
            'default_hooks.checkpoint.max_keep_ckpts': 10,
        }
    )
    place(cfg, voc, work_dir)
    cfg.train_dataloader.dataset.pipeline[2] = dict(type='CenterCrop48')
    cfg.merge_from_dict(options)
    cfg.custom_hooks = [ConfigDict(hook) for hook in hooks]
    return cfg
