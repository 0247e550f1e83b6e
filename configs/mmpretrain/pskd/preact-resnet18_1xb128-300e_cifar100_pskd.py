_base_ = './preact-resnet18_1xb128-300e_cifar100_plain.py'
default_hooks = dict(pskd=dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8))
