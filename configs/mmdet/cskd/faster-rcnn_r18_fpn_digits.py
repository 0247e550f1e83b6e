_base_ = ['../baseline/faster-rcnn_r18_fpn_digits.py', '../_base_/cskd.py']
