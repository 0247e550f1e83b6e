_base_ = '../_base_/mnist.py'
model = dict(head=dict(loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1)))
