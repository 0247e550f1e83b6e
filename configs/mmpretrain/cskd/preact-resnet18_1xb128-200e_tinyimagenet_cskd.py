_base_ = './preact-resnet18_1xb128-200e_tinyimagenet_plain.py'
default_hooks = dict(cskd=dict(type='selfkd_mmpretrain.CSKDHook', temperature=4.0, weight=1.0))
