_base_ = ['efficientnet-b0_fpn-bifpn.py']
model = dict(
    backbone=dict(
        arch='b2',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/efficientnet/'
            'efficientnet-b2_3rdparty_8xb32-aa_in1k_20220119-1655338a.pth',
        ),
    ),
    neck=dict(in_channels=[24, 48, 88, 352], width=112),
    decode_head=dict(in_channels=112),
)
