_base_ = './resnet18-cifar_1xb128-200e_cifar100_frskd.py'
model = dict(train_cfg=dict(augments=dict(type='Mixup', alpha=0.2)))
