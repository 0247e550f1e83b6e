_base_ = [
    'mmpretrain::_base_/models/resnet18.py',
    '../_base_/imagenet.py',
    '../_base_/schedule_90e.py',
    '../_base_/runtime.py',
]
model = dict(backbone=dict(zero_init_residual=False))
