_base_ = './faster-rcnn_r18_fpn_digits.py'

# Three stages, with the overlaps, weights and box scales of MMDetection's cascade-rcnn_r50_fpn.
overlaps, stds = [0.5, 0.6, 0.7], [(0.1, 0.2), (0.05, 0.1), (0.033, 0.067)]
head = dict(
    type='ConvFCBBoxHead',
    num_shared_convs=2,
    num_shared_fcs=1,
    in_channels=32,
    conv_out_channels=64,
    fc_out_channels=128,
    norm_cfg=dict(type='GN', num_groups=8),
    roi_feat_size=7,
    num_classes=10,
    reg_class_agnostic=True,
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0),
)
sampler = dict(type='RandomSampler', num=32, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True)
model = dict(
    type='CascadeRCNN',
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[
            dict(
                head,
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0.0] * 4,
                    target_stds=[center, center, size, size],
                ),
            )
            for center, size in stds
        ],
    ),
    train_cfg=dict(
        rcnn=[
            dict(
                assigner=dict(
                    type='MaxIoUAssigner',
                    pos_iou_thr=overlap,
                    neg_iou_thr=overlap,
                    min_pos_iou=overlap,
                    match_low_quality=False,
                    ignore_iof_thr=-1,
                ),
                sampler=sampler,
                pos_weight=-1,
                debug=False,
            )
            for overlap in overlaps
        ]
    ),
)
