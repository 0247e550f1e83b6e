# CS-KD's DenseNet-121 for 224 x 224 images, as released: kaiming normal by fan_in; the linear layer torch's own with a
# bias of 0.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='DenseNet', arch='121', init_cfg=dict(type='Kaiming', layer='Conv2d', mode='fan_in')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=None,
        in_channels=1024,
        loss=dict(type='CrossEntropyLoss'),
        init_cfg=dict(
            type='Kaiming', layer='Linear', a=5**0.5, mode='fan_in', nonlinearity='leaky_relu', distribution='uniform'
        ),
    ),
)
