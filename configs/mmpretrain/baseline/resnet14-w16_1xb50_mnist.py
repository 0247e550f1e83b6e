_base_ = '../_base_/mnist.py'
