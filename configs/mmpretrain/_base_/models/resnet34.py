# ResNet-34 for 224 x 224 images, as released: kaiming normal by fan_out; the linear layer as torch's own.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=34, zero_init_residual=False),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=None,
        in_channels=512,
        loss=dict(type='CrossEntropyLoss'),
        init_cfg=None,
    ),
)
