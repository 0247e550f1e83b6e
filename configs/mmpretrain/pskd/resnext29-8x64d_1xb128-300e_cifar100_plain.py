_base_ = ['../_base_/cifar100.py', '../_base_/schedule_300e.py', '../_base_/runtime.py']
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='selfkd_mmpretrain.ResNeXt_CIFAR', depth=29, groups=8, width_per_group=64, zero_init_residual=False
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=100, in_channels=1024, loss=dict(type='CrossEntropyLoss')),
)
