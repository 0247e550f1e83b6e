# PS-KD for MMDetection's detectors, two-stage and RetinaNet, FCOS, ATSS: name this file among a config's _base_.
custom_hooks = [dict(type='selfkd_mmdet.PSKDHook', alpha=0.8)]
