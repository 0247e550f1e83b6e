# CS-KD for MMDetection's two-stage detectors. In a config of your own write
#     default_hooks = dict(cskd=dict(type='selfkd_mmdet.CSKDHook', weight=1.0, temperature=4.0))
# which adds to the hooks there are. Or name this file among the _base_. Two of those may not set the same key, and most
# configs set default_hooks, so it is custom_hooks here; beside a config that has custom_hooks mmengine refuses it.
custom_hooks = [dict(type='selfkd_mmdet.CSKDHook', weight=1.0, temperature=4.0)]
