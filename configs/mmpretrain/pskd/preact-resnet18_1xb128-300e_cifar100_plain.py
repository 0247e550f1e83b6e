_base_ = [
    '../_base_/models/preact-resnet18.py',
    '../_base_/cifar100.py',
    '../_base_/schedule_300e.py',
    '../_base_/runtime.py',
]
model = dict(head=dict(num_classes=100))
