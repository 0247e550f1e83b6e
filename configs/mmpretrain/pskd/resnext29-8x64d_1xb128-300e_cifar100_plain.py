_base_ = [
    '../_base_/models/resnext29-8x64d.py',
    '../_base_/cifar100.py',
    '../_base_/schedule_300e.py',
    '../_base_/runtime.py',
]
model = dict(head=dict(num_classes=100))
