# A usual ImageNet schedule, not the released code's: PS-KD's is schedule_300e.py, FRSKD's has its 200 epochs only.
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4))
param_scheduler = dict(type='MultiStepLR', by_epoch=True, milestones=[30, 60], gamma=0.1)
train_cfg = dict(by_epoch=True, max_epochs=90, val_interval=1)
val_cfg, test_cfg = dict(), dict()
