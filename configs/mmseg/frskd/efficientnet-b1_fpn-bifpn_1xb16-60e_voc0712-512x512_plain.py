_base_ = [
    '../_base_/efficientnet-b1_fpn-bifpn.py',
    '../_base_/voc0712.py',
    '../_base_/schedule_60e.py',
    'mmseg::_base_/default_runtime.py',
]
log_processor = dict(by_epoch=True)
