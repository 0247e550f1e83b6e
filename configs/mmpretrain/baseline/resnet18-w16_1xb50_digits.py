_base_ = '../_base_/digits.py'
