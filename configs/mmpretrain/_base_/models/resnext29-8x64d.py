# PS-KD's ResNeXt-29, as released: kaiming normal, by fan_out for convolutions and fan_in for the linear layer.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='selfkd_mmpretrain.ResNeXt_CIFAR', depth=29, groups=8, width_per_group=64, zero_init_residual=False
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=None,
        in_channels=1024,
        loss=dict(type='CrossEntropyLoss'),
        init_cfg=dict(type='Kaiming', layer='Linear', mode='fan_in'),
    ),
)
