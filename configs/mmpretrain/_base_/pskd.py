# PS-KD for any MMPretrain classifier: name this file among a config's _base_.
custom_hooks = [dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)]
