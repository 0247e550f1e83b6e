_base_ = ['../_base_/crops.py', '../_base_/pskd.py']
