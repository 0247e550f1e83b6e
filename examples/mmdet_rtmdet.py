# PS-KD in MMDetection, over RTMDet from its own zoo:
#   python tools/make_toy_data.py voc data/VOCdevkit
#   mim train mmdet examples/mmdet_rtmdet.py
_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'

# All that selfkd needs. It adds to the hooks of RTMDet's config, whose EMAHook stays:
default_hooks = dict(pskd=dict(type='selfkd_mmdet.PSKDHook', alpha=0.8))

# Your data and schedule, here digits on photographs in the layout of PASCAL VOC:
model = dict(backbone=dict(init_cfg=None), bbox_head=dict(num_classes=10))
dataset = dict(
    _delete_=True,
    type='VOCDataset',
    data_root='data/VOCdevkit/',
    data_prefix=dict(sub_data_root='VOC2007/'),
    metainfo=dict(classes=('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')),
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale_factor=1.0, keep_ratio=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(ann_file='VOC2007/ImageSets/Main/trainval.txt', pipeline=pipeline, **dataset),
)
val_dataloader = test_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(ann_file='VOC2007/ImageSets/Main/test.txt', test_mode=True, pipeline=pipeline, **dataset),
)
val_evaluator = test_evaluator = dict(_delete_=True, type='VOCMetric', metric='mAP')
train_cfg = dict(max_epochs=20, dynamic_intervals=None)
