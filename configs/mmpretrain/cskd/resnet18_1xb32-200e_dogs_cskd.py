_base_ = './resnet18_1xb32-200e_dogs_plain.py'
default_hooks = dict(cskd=dict(type='selfkd_mmpretrain.CSKDHook', temperature=4.0, weight=3.0))
