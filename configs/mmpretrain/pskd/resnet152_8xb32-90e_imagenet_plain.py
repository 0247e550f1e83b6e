_base_ = ['../_base_/imagenet.py', '../_base_/schedule_90e.py', '../_base_/runtime.py']
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=152, zero_init_residual=False),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=1000, in_channels=2048, loss=dict(type='CrossEntropyLoss')),
)
train_dataloader = dict(batch_size=32)
