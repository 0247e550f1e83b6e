_base_ = './resnet18-cifar_1xb128-200e_cifar100_plain.py'
model = dict(
    type='selfkd_mmpretrain.FRSKDImageClassifier',
    self_teacher=dict(
        alpha=2,
        beta=100,
        feature_loss='hint',  # (beta is attention transfer's: the paper's for hints is not in the released code)
    ),
)
