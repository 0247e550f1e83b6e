_base_ = ['../baseline/retinanet_r18_fpn_digits.py', '../_base_/pskd.py']
