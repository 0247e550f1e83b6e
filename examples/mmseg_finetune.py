# PS-KD in MMSegmentation, to fine-tune what a plain run has left:
#   python tools/make_toy_data.py voc data/VOCdigits --one-class
#   mim train mmsegmentation examples/mmseg_finetune.py
_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'

# All that selfkd needs. The past copy is taken anew every 50 iterations:
default_hooks = dict(pskd=dict(type='selfkd_mmseg.PSKDHook', alpha=0.3, interval=50))

# The plain run's checkpoint, your data and schedule:
load_from = 'work_dirs/plain/iter_600.pth'
crop_size = (96, 96)
data_preprocessor = dict(size=crop_size)
model = dict(
    pretrained=None,
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=2),
    auxiliary_head=dict(num_classes=2),
)
dataset = dict(
    _delete_=True,
    type='BaseSegDataset',
    data_root='data/VOCdigits/VOC2007',
    data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
    img_suffix='.jpg',
    seg_map_suffix='.png',
    metainfo=dict(classes=('background', 'digit'), palette=[[40, 40, 40], [255, 170, 0]]),
)
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
pack = dict(type='PackSegInputs')
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        ann_file='ImageSets/Segmentation/trainval.txt',
        pipeline=[*load, dict(type='RandomCrop', crop_size=crop_size), pack],
        **dataset,
    ),
)
val_dataloader = test_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(ann_file='ImageSets/Segmentation/test.txt', pipeline=[*load, pack], **dataset),
)
train_cfg = dict(max_iters=200, val_interval=200)
