# The trainval sets of PASCAL VOC 2007 and 2012 (422 + 2913 images with masks), validated on VOC 2007 test: FRSKD's data
# as released. Training: shorter side drawn from 256 to 1024, padded with black (background) and cropped to 512 x 512.
# Validation: image and mask resized to 512 x 512, and compared there. Images are read and resized by PIL.
custom_imports = dict(imports=['mmpretrain.datasets'], allow_failed_imports=False)  # for its GaussianBlur
dataset_type, root = 'PascalVOCDataset', 'data/VOCdevkit'
load_image = dict(type='LoadImageFromFile', imdecode_backend='pillow')
train_pipeline = [
    load_image,
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomResize',
        scale=[(10**5, 256), (10**5, 1024)],
        resize_type='Resize',
        keep_ratio=True,
        backend='pillow',
    ),
    dict(type='Pad', size=(512, 512), pad_val=dict(img=0, seg=0)),
    dict(type='RandomCrop', crop_size=(512, 512)),
    dict(type='mmpretrain.GaussianBlur', magnitude_range=(0, 1), magnitude_std='inf', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    load_image,
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(512, 512), keep_ratio=False, backend='pillow'),
    dict(type='PackSegInputs'),
]
# Predictions are resized to ori_shape before they are compared: for the score, that is the present shape.
score_here = dict(type='KeyMapper', mapping=dict(ori_shape='img_shape'), remapping=dict(ori_shape='ori_shape'))
val_pipeline = [*test_pipeline[:-1], score_here, test_pipeline[-1]]
train = dict(
    type=dataset_type,
    data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
    ann_file='ImageSets/Segmentation/trainval.txt',
    pipeline=train_pipeline,
)
train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ConcatDataset',
        datasets=[dict(data_root=f'{root}/VOC2007', **train), dict(data_root=f'{root}/VOC2012', **train)],
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=f'{root}/VOC2007',
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
        ann_file='ImageSets/Segmentation/test.txt',
        pipeline=val_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='selfkd_mmseg.PixelCalibrationMetric')]
test_evaluator = val_evaluator
