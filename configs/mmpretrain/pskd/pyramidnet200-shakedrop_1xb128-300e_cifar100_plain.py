_base_ = [
    '../_base_/models/pyramidnet200.py',
    '../_base_/cifar100.py',
    '../_base_/schedule_300e.py',
    '../_base_/runtime.py',
]
model = dict(backbone=dict(shake_drop=0.5), head=dict(num_classes=100))
