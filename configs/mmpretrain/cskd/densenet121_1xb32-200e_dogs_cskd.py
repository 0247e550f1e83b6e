_base_ = './densenet121_1xb32-200e_dogs_plain.py'
custom_hooks = [dict(type='selfkd_mmpretrain.CSKDHook', temperature=4.0, weight=3.0)]
