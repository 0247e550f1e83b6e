_base_ = './resnet18-cifar_1xb128-200e_cifar100_frskd.py'
model = dict(self_teacher=dict(sla=1.0))
