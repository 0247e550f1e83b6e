_base_ = ['../_base_/mnist.py', '../_base_/cskd.py']
