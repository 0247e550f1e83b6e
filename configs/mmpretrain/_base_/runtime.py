# What the papers report, on the test set after every epoch, and what a run keeps.
default_scope = 'mmpretrain'
val_evaluator = [
    dict(type='Accuracy', topk=(1, 5)),
    dict(type='selfkd_mmpretrain.CalibrationMetric'),
    dict(type='selfkd_mmpretrain.SelectiveMetric'),
]
test_evaluator = val_evaluator
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=100),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
randomness = dict(seed=0)
