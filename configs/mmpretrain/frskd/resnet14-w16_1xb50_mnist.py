_base_ = '../_base_/mnist.py'
model = dict(type='selfkd_mmpretrain.FRSKDImageClassifier', self_teacher=dict(alpha=2, beta=100))
