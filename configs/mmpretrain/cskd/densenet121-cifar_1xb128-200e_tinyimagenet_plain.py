_base_ = ['../_base_/tinyimagenet.py', '../_base_/schedule_200e.py', '../_base_/runtime.py']
model = dict(
    type='ImageClassifier',
    backbone=dict(type='selfkd_mmpretrain.DenseNet_CIFAR', arch='121'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=200, in_channels=1024, loss=dict(type='CrossEntropyLoss')),
)
