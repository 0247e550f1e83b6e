# FRSKD's WRN-16-2, as released: kaiming normal by fan_out; the linear layer torch's own with a bias of 0.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='selfkd_mmpretrain.WideResNet_CIFAR', depth=16, widen_factor=2),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=None,
        in_channels=128,
        loss=dict(type='CrossEntropyLoss'),
        init_cfg=dict(
            type='Kaiming', layer='Linear', a=5**0.5, mode='fan_in', nonlinearity='leaky_relu', distribution='uniform'
        ),
    ),
)
