_base_ = ['../baseline/fpn_r18_digits.py', '../_base_/pskd.py']
