_base_ = [
    'mmpretrain::_base_/models/densenet/densenet121.py',
    '../_base_/mit67.py',
    '../_base_/schedule_200e.py',
    '../_base_/runtime_recall.py',
]
model = dict(head=dict(num_classes=67))
