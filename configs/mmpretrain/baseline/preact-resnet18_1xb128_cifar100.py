_base_ = '../../_base_/cifar100.py'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='selfkd_mmpretrain.PreActResNet', depth=18),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=100, in_channels=512, loss=dict(type='CrossEntropyLoss'), topk=(1, 5)),
)
