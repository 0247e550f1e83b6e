# CS-KD for any MMPretrain classifier: name this file among a config's _base_.
custom_hooks = [dict(type='selfkd_mmpretrain.CSKDHook', temperature=4.0, weight=1.0)]
