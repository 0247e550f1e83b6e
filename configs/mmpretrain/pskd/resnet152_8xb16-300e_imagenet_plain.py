_base_ = [
    '../_base_/models/resnet152.py',
    '../_base_/imagenet_jitter.py',
    '../_base_/schedule_300e.py',
    '../_base_/runtime.py',
]
model = dict(head=dict(num_classes=1000))
train_dataloader = dict(batch_size=16)  # 128 over 8 GPUs
