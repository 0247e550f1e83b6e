# Digits on photographs in VOC's layout for MMSegmentation: a pixel is one of a digit or not. Minutes on a CPU.
# python tools/make_toy_data.py voc data/VOCdigits --one-class
default_scope = 'mmseg'

metainfo = dict(classes=('background', 'digit'), palette=[[40, 40, 40], [255, 170, 0]])
dataset = dict(
    type='BaseSegDataset',
    data_root='data/VOCdigits/VOC2007',
    data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
    img_suffix='.jpg',
    seg_map_suffix='.png',
    metainfo=metainfo,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(96, 96)),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        ann_file='ImageSets/Segmentation/trainval.txt',
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='ImageSets/Segmentation/test.txt',
        pipeline=test_pipeline,
        **dataset,
    ),
)
val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='selfkd_mmseg.PixelCalibrationMetric')]
test_dataloader, test_evaluator = val_dataloader, val_evaluator

iters = 600
# Without more speed for the classifier, its logits stay small for long: so few pixels are of a digit.
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(conv_seg=dict(lr_mult=10.0))),
)
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
