_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', '../_base_/voc_digits.py']

# From scratch, small: as faster-rcnn_r18_fpn_digits.py, with levels from stride 8 and two convolutions in the head.
model = dict(
    backbone=dict(depth=18, base_channels=16, stem_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, num_outs=3, add_extra_convs=False),
    bbox_head=dict(
        num_classes=10,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        anchor_generator=dict(scales_per_octave=2, strides=[8, 16, 32]),
    ),
)
# It learns more slowly than Faster R-CNN.
epochs = 60
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='MultiStepLR', milestones=[epochs * 3 // 4, epochs - 5], gamma=0.1),
]
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
