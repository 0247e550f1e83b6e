# PS-KD in MMPretrain, over a config of its own zoo:
#   python tools/make_toy_data.py digits data/digits
#   mim train mmpretrain examples/mmpretrain_resnet.py
_base_ = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'

# All that selfkd needs:
default_hooks = dict(pskd=dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.3))

# Your data and schedule, here images in folders that are named as their classes:
model = dict(head=dict(num_classes=10))
dataset = dict(_delete_=True, type='CustomDataset', data_root='data/digits', data_prefix='train')
load = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(batch_size=50, num_workers=0, persistent_workers=False, dataset=dict(pipeline=load, **dataset))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(dataset, data_prefix='test', pipeline=load, test_mode=True)
)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=20)
