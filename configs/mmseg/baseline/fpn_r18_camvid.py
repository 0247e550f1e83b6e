_base_ = ['mmseg::_base_/models/fpn_r50.py', '../_base_/camvid.py']

# From scratch, small: ResNet-18 of a quarter of the width.
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(180, 240), test_cfg=dict(size_divisor=32)),
    backbone=dict(depth=18, base_channels=16, stem_channels=16, norm_cfg=norm_cfg),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    decode_head=dict(in_channels=[32] * 4, channels=32, num_classes=11, norm_cfg=norm_cfg, ignore_index=11),
)
