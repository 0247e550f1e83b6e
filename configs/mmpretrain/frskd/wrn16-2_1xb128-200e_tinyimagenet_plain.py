_base_ = [
    '../_base_/models/wrn16-2.py',
    '../_base_/tinyimagenet_frskd.py',
    '../_base_/schedule_200e.py',
    '../_base_/runtime.py',
]
model = dict(head=dict(num_classes=200))
