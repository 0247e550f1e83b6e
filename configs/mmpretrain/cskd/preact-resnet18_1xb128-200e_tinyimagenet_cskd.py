_base_ = './preact-resnet18_1xb128-200e_tinyimagenet_plain.py'
custom_hooks = [dict(type='selfkd_mmpretrain.CSKDHook', temperature=4.0, weight=1.0)]
