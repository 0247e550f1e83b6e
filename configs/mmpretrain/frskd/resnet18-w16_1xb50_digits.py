_base_ = '../_base_/digits.py'
model = dict(
    backbone=dict(out_indices=(0, 1, 2, 3)),
    neck=None,
    head=dict(
        _delete_=True,
        type='selfkd_mmpretrain.FRSKDClsHead',
        num_classes=10,
        in_channels=[16, 32, 64, 128],
        alpha=2,
        beta=100,
    ),
)
