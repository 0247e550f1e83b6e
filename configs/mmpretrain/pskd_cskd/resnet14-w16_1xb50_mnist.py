_base_ = '../_base_/mnist.py'
custom_hooks = [dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8), dict(type='selfkd_mmpretrain.CSKDHook')]
