"""MMDetection's own RetinaNet, small."""

_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'
model = dict(
    backbone=dict(depth=18, init_cfg=None),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=16),
    bbox_head=dict(num_classes=10, in_channels=16, feat_channels=16),
)
