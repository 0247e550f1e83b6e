# PS-KD for any MMPretrain classifier. In a config of your own write
#     default_hooks = dict(pskd=dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.3))
# which adds to the hooks there are. Or name this file among the _base_. Two of those may not set the same key, and most
# configs set default_hooks, so it is custom_hooks here; beside a config that has custom_hooks mmengine refuses it.
custom_hooks = [dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.3)]
