_base_ = '../_base_/digits.py'
default_hooks = dict(pskd=dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8))
