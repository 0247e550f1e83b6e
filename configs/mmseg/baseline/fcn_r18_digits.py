_base_ = ['mmseg::_base_/models/fcn_r50-d8.py', '../../_base_/voc_digits_seg.py']

# From scratch, small: ResNet-18 of half the width, output stride 8.
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(96, 96), test_cfg=dict(size_divisor=32)),
    backbone=dict(depth=18, base_channels=32, stem_channels=32, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=256, channels=64, num_classes=11, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=11, norm_cfg=norm_cfg),
)
