_base_ = ['efficientnet-b0_fpn-bifpn.py']
width = 112
model = dict(
    backbone=dict(
        arch='b2',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/efficientnet/'
            'efficientnet-b2_3rdparty_8xb32-aa_in1k_20220119-1655338a.pth',
        ),
    ),
    neck=[
        dict(type='FPN', in_channels=[24, 48, 120, 352], out_channels=width, num_outs=6),
        dict(type='selfkd.pyramid.BiFPN', in_channels=[width] * 6, channels=[width] * 6, depth=1, repeats=3),
    ],
    decode_head=dict(in_channels=width),
)
