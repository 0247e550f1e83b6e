# PS-KD's and CS-KD's DenseNet-121 for 32 x 32 images, as released: torch's own initialisation throughout.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='selfkd_mmpretrain.DenseNet_CIFAR', arch='121'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=None,
        in_channels=1024,
        loss=dict(type='CrossEntropyLoss'),
        init_cfg=None,
    ),
)
