# FRSKD's ResNet-18 for 32 x 32 images, as released: torch's own initialisation throughout.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet_CIFAR', depth=18, zero_init_residual=False, init_cfg=None),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=None,
        in_channels=512,
        loss=dict(type='CrossEntropyLoss'),
        init_cfg=None,
    ),
)
