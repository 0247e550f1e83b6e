_base_ = [
    'mmpretrain::_base_/models/resnet18.py',
    '../_base_/cub200.py',
    '../_base_/schedule_200e.py',
    '../_base_/runtime.py',
]
model = dict(backbone=dict(zero_init_residual=False), head=dict(num_classes=200))
