# FRSKD's segmentation model as released: levels P2 to P7 of EfficientNet, FPN, three BiFPN layers, and a head on P2.
# Layers whose weights are not loaded start as torch initialises them.
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(
        type='selfkd_mmpretrain.efficientnet.EfficientNetLevels',
        arch='b0',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/efficientnet/'
            'efficientnet-b0_3rdparty_8xb32-aa_in1k_20220119-8d939117.pth',
            prefix='backbone',
        ),
    ),
    neck=dict(type='selfkd_mmseg.EfficientDetNeck', in_channels=[24, 40, 80, 320], width=64),
    decode_head=dict(
        type='selfkd_mmseg.ConvHead',
        in_channels=64,
        in_index=0,
        channels=256,
        num_classes=21,
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
# Two convolutions of the neck are never called; without a self-teacher, no loss sees its coarser maps.
find_unused_parameters = True
