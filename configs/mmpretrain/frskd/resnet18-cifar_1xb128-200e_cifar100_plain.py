_base_ = [
    '../_base_/models/resnet18-cifar.py',
    '../_base_/cifar100.py',
    '../_base_/schedule_200e.py',
    '../_base_/runtime.py',
]
model = dict(head=dict(num_classes=100))
