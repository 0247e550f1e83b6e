_base_ = [
    '../_base_/models/densenet121.py',
    '../_base_/cub200.py',
    '../_base_/schedule_200e_cskd.py',
    '../_base_/runtime_recall.py',
]
model = dict(head=dict(num_classes=200))
