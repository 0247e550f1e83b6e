_base_ = '../_base_/crops.py'
