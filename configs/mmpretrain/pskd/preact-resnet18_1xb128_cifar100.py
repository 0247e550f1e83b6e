_base_ = ['../baseline/preact-resnet18_1xb128_cifar100.py', '../../_base_/pskd.py']
