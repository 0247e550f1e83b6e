_base_ = './resnet18_1xb32-200e_cub200_plain.py'
model = dict(
    type='selfkd_mmpretrain.FRSKDImageClassifier',
    self_teacher=dict(
        alpha=2,  # CIFAR-100's; the paper's for this data set are not in the released code
        beta=100,
    ),
)
