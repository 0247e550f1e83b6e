_base_ = ['../_base_/digits.py', '../_base_/pskd.py']
