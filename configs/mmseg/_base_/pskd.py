# PS-KD for MMSegmentation's encoder-decoders: name this file among a config's _base_.
custom_hooks = [dict(type='selfkd_mmseg.PSKDHook', alpha=0.3)]
