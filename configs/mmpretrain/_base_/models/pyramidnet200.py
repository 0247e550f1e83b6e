# PS-KD's PyramidNet-200, as released: kaiming normal by fan_out; the linear layer as torch's own.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='selfkd_mmpretrain.PyramidNet_CIFAR', depth=200, alpha=240),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=None,
        in_channels=1024,
        loss=dict(type='CrossEntropyLoss'),
        init_cfg=None,
    ),
)
