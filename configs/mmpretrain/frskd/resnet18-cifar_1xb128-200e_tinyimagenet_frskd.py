_base_ = './resnet18-cifar_1xb128-200e_tinyimagenet_plain.py'
model = dict(
    backbone=dict(out_indices=(0, 1, 2, 3)),
    neck=None,
    head=dict(
        _delete_=True,
        type='selfkd_mmpretrain.FRSKDClsHead',
        num_classes=200,
        in_channels=[64, 128, 256, 512],
        alpha=2,  # CIFAR-100's; the paper's for this data set are not in the released code
        beta=100,
    ),
)
