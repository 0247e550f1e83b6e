_base_ = ['../_base_/models/resnet18.py', '../_base_/mit67.py', '../_base_/schedule_200e.py', '../_base_/runtime.py']
model = dict(head=dict(num_classes=67))
