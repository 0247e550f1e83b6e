_base_ = ['efficientnet-b0_fpn-bifpn.py']
width = 88
model = dict(
    backbone=dict(
        arch='b1',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/efficientnet/'
            'efficientnet-b1_3rdparty_8xb32-aa_in1k_20220119-619d8ae3.pth',
        ),
    ),
    neck=[
        dict(type='FPN', in_channels=[24, 40, 112, 320], out_channels=width, num_outs=6),
        dict(type='selfkd.pyramid.BiFPN', in_channels=[width] * 6, channels=[width] * 6, depth=1, repeats=3),
    ],
    decode_head=dict(in_channels=width),
)
