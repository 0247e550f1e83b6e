_base_ = './faster-rcnn_r18_fpn_digits.py'

# The paper's protocol in small: the backbone was trained as a classifier, on crops of such scenes, in MMPretrain
# (configs/mmpretrain/*/resnet50-w16_1xb50_crops.py), and its first stage and batch norms stay as they are.
model = dict(
    backbone=dict(
        depth=50,
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(_delete_=True, type='Pretrained', checkpoint='work_dirs/resnet50-w16.pth'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
    roi_head=dict(bbox_head=dict(fc_out_channels=256)),
    train_cfg=dict(rcnn=dict(sampler=dict(num=64))),
)
epochs = 8
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='MultiStepLR', milestones=[epochs * 3 // 4, epochs - 1], gamma=0.1),
]
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
