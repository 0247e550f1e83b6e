_base_ = ['../_base_/dogs.py', '../_base_/schedule_200e.py', '../_base_/runtime.py']
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=18, zero_init_residual=False),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=120, in_channels=512, loss=dict(type='CrossEntropyLoss')),
)
custom_hooks = [dict(type='selfkd_mmpretrain.KeepFeaturesHook')]
val_evaluator = [
    dict(type='Accuracy', topk=(1, 5)),
    dict(type='selfkd_mmpretrain.CalibrationMetric'),
    dict(type='selfkd_mmpretrain.SelectiveMetric'),
    dict(type='selfkd_mmpretrain.RecallAt1'),
]
test_evaluator = val_evaluator
