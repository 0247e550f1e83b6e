_base_ = ['../_base_/models/resnet34.py', '../_base_/imagenet.py', '../_base_/schedule_90e.py', '../_base_/runtime.py']
model = dict(head=dict(num_classes=1000))
