_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/voc_digits.py']

# From scratch, small: a quarter of ResNet-18's channels, four levels with 32 channels. What makes it learn in minutes:
# norms everywhere, and anchors that reach the digits, which are 13 to 50 pixels large and taller than wide.
norm_cfg = dict(type='GN', num_groups=8)
model = dict(
    backbone=dict(depth=18, base_channels=16, stem_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[3, 4, 5], ratios=[1.0, 1.5, 2.0], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=32, finest_scale=56, featmap_strides=[4, 8], roi_layer=dict(sampling_ratio=2)
        ),
        bbox_head=dict(
            type='ConvFCBBoxHead',
            num_shared_convs=2,
            num_shared_fcs=1,
            in_channels=32,
            conv_out_channels=64,
            fc_out_channels=128,
            norm_cfg=norm_cfg,
            num_classes=10,
        ),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=100, max_per_img=50), rcnn=dict(sampler=dict(num=32, pos_fraction=0.5))),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50)),
)
