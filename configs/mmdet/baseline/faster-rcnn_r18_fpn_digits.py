_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/voc_digits.py']

# From scratch, small: a quarter of ResNet-18's channels, batch norms that are trained, four levels with 32 channels.
model = dict(
    backbone=dict(depth=18, base_channels=16, stem_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, num_outs=4),
    rpn_head=dict(in_channels=32, feat_channels=32, anchor_generator=dict(scales=[6], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32, finest_scale=56, featmap_strides=[4, 8]),
        bbox_head=dict(in_channels=32, fc_out_channels=128, num_classes=10),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=100, max_per_img=50), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50)),
)
