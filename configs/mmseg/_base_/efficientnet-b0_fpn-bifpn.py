# FRSKD's segmentation model: levels P2 to P7 of EfficientNet, FPN, three BiFPN layers, and a head on the finest level.
custom_imports = dict(imports=['mmpretrain.models'], allow_failed_imports=False)
width = 64
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
        type='mmpretrain.EfficientNet',
        arch='b0',
        out_indices=(2, 3, 4, 5),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/efficientnet/'
            'efficientnet-b0_3rdparty_8xb32-aa_in1k_20220119-8d939117.pth',
            prefix='backbone',
        ),
    ),
    neck=[
        dict(type='FPN', in_channels=[24, 40, 112, 320], out_channels=width, num_outs=6),
        dict(type='selfkd.pyramid.BiFPN', in_channels=[width] * 6, channels=[width] * 6, depth=1, repeats=3),
    ],
    decode_head=dict(type='selfkd_mmseg.ConvHead', in_channels=width, in_index=0, channels=256, num_classes=21),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
# EfficientNet's last layer is not used, nor (without a self-teacher) the coarser maps of the last BiFPN layer.
find_unused_parameters = True
