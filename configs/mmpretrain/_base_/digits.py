# Handwritten digits, 8 x 8 (tools/make_toy_data.py digits data/digits), and a small ResNet: minutes on a CPU.
default_scope = 'mmpretrain'

model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet_CIFAR', depth=18, base_channels=16, stem_channels=16, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=128, loss=dict(type='CrossEntropyLoss')),
)
data_preprocessor = dict(num_classes=10, mean=[77.0] * 3, std=[96.0] * 3, to_rgb=True)

# No augmentation, so that the network fits all of its training labels, as the papers' networks do on CIFAR-100.
train_pipeline = test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]

train_dataloader = dict(
    batch_size=50,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(type='CustomDataset', data_root='data/digits', data_prefix='train', pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(type='CustomDataset', data_root='data/digits', data_prefix='test', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader, test_evaluator = val_dataloader, val_evaluator

epochs = 20
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4))
param_scheduler = dict(type='MultiStepLR', by_epoch=True, milestones=[epochs // 2, epochs * 3 // 4], gamma=0.1)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
val_cfg, test_cfg = dict(), dict()
auto_scale_lr = dict(base_batch_size=50)

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=16),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
randomness = dict(seed=0)
