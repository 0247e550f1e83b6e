# The measures of CS-KD's fine-grained experiments: Recall@1 besides.
_base_ = './runtime.py'
default_hooks = dict(features=dict(type='selfkd_mmpretrain.KeepFeaturesHook'))
val_evaluator = [
    dict(type='Accuracy', topk=(1, 5)),
    dict(type='selfkd_mmpretrain.CalibrationMetric'),
    dict(type='selfkd_mmpretrain.SelectiveMetric'),
    dict(type='selfkd_mmpretrain.RecallAt1'),
]
test_evaluator = val_evaluator
