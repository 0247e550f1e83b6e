# CS-KD for MMDetection's two-stage detectors: name this file among a config's _base_.
custom_hooks = [dict(type='selfkd_mmdet.CSKDHook', weight=1.0, temperature=4.0)]
