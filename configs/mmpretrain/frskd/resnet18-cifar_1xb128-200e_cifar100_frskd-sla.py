_base_ = './resnet18-cifar_1xb128-200e_cifar100_frskd.py'
model = dict(type='selfkd_mmpretrain.SLAImageClassifier', head=dict(sla=1.0))
