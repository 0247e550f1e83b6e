# What PS-KD calls PreAct ResNet-101, as released: torch's own initialisation throughout.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet_CIFAR', depth=101, zero_init_residual=False, init_cfg=None),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=None,
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss'),
        init_cfg=None,
    ),
)
