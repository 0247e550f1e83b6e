# The trainval sets of PASCAL VOC 2007 and 2012 (422 + 2913 images with masks), validated on VOC 2007 test. Crops of
# 512 x 512; the other augmentations are MMSegmentation's for VOC.
_base_ = ['mmseg::_base_/datasets/pascal_voc12_aug.py']
root = 'data/VOCdevkit'
train = dict(
    type='PascalVOCDataset',
    data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
    ann_file='ImageSets/Segmentation/trainval.txt',
    pipeline={{_base_.train_pipeline}},
)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        datasets=[dict(data_root=f'{root}/VOC2007', **train), dict(data_root=f'{root}/VOC2012', **train)],
    ),
)
val_dataloader = dict(dataset=dict(data_root=f'{root}/VOC2007', ann_file='ImageSets/Segmentation/test.txt'))
test_dataloader = val_dataloader
val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='selfkd_mmseg.PixelCalibrationMetric')]
test_evaluator = val_evaluator
