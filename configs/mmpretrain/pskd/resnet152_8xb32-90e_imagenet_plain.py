_base_ = ['../_base_/models/resnet152.py', '../_base_/imagenet.py', '../_base_/schedule_90e.py', '../_base_/runtime.py']
# Cheaper than what PS-KD's authors released (resnet152_8xb16-300e): a usual schedule, no colour jitter, no lighting.
model = dict(head=dict(num_classes=1000))
train_dataloader = dict(batch_size=32)
