_base_ = ['../baseline/fcn_r18_digits.py', '../../_base_/pskd_mmseg.py']
