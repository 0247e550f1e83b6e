_base_ = [
    '../_base_/models/resnet18.py',
    '../_base_/mit67.py',
    '../_base_/schedule_200e_cskd.py',
    '../_base_/runtime_recall.py',
]
model = dict(head=dict(num_classes=67))
