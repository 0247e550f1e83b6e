_base_ = './wrn16-2_1xb128-200e_cifar100_plain.py'
model = dict(
    backbone=dict(out_indices=(0, 1, 2)),
    neck=None,
    head=dict(
        _delete_=True,
        type='selfkd_mmpretrain.FRSKDClsHead',
        num_classes=100,
        in_channels=[32, 64, 128],
        alpha=2,
        beta=100,
    ),
)
