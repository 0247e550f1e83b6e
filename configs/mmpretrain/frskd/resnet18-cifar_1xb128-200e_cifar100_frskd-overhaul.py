_base_ = './resnet18-cifar_1xb128-200e_cifar100_plain.py'
model = dict(
    backbone=dict(type='selfkd_mmpretrain.PreReluResNet_CIFAR', out_indices=(0, 1, 2, 3)),
    neck=None,
    head=dict(
        _delete_=True,
        type='selfkd_mmpretrain.FRSKDClsHead',
        num_classes=100,
        in_channels=[64, 128, 256, 512],
        alpha=2,
        beta=1e-3,  # our choice: the loss is a sum over positions, and the paper's weight is not in the released code
        feature_loss='overhaul',
        preact=True,
    ),
)
