# ImageNet as PS-KD augments it: colour jitter and PCA lighting besides. Both act on numbers that are not rounded or
# clipped, as released. (MMPretrain's ColorJitter rounds and clips; its Lighting on bytes lets 256 become 0.)
_base_ = './imagenet.py'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, backend='pillow'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='selfkd_mmpretrain.FloatColorJitter', brightness=0.4, contrast=0.4, saturation=0.4),
    dict(
        type='Lighting',
        alphastd=0.1,
        eigval=[55.4625, 4.7940, 1.1475],  # of 255, as the image
        eigvec=[[-0.5836, -0.6948, 0.4203], [-0.5808, -0.0045, -0.8140], [-0.5675, 0.7192, 0.4009]],  # blue, green, red
    ),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
