_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/bccd.py']

# From scratch, small, as for the digits: a quarter of ResNet-18's channels, four levels with 32 channels, norms
# everywhere. At this size 98 % of the cells are 16 to 114 pixels large.
norm_cfg = dict(type='GN', num_groups=8)
model = dict(
    backbone=dict(depth=18, base_channels=16, stem_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[4], ratios=[0.7, 1.0, 1.4], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=32, finest_scale=56, featmap_strides=[4, 8, 16], roi_layer=dict(sampling_ratio=2)
        ),
        bbox_head=dict(
            type='ConvFCBBoxHead',
            num_shared_convs=2,
            num_shared_fcs=1,
            in_channels=32,
            conv_out_channels=64,
            fc_out_channels=128,
            norm_cfg=norm_cfg,
            num_classes=3,
        ),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=64, pos_fraction=0.5))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
