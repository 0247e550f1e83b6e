# The paper's 60 epochs in MMSegmentation's iterations: 417 of 8 images are one pass over 3335; four make a batch of 32.
_base_ = ['mmseg::_base_/schedules/schedule_20k.py']
epoch = 417
optim_wrapper = dict(
    accumulative_counts=4,
    clip_grad=dict(_delete_=True, type='value', clip_value=2.0),
)
param_scheduler = [dict(type='MultiStepLR', by_epoch=False, milestones=[40 * epoch], gamma=0.1)]
train_cfg = dict(max_iters=60 * epoch, val_interval=5 * epoch)
default_hooks = dict(checkpoint=dict(interval=5 * epoch))
