_base_ = ['efficientnet-b0_fpn-bifpn.py']
model = dict(
    backbone=dict(
        arch='b1',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/efficientnet/'
            'efficientnet-b1_3rdparty_8xb32-aa_in1k_20220119-619d8ae3.pth',
        ),
    ),
    neck=dict(width=88),
    decode_head=dict(in_channels=88),
)
