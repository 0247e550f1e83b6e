_base_ = './resnet18_1xb256-90e_imagenet_plain.py'
model = dict(
    type='selfkd_mmpretrain.FRSKDImageClassifier',
    self_teacher=dict(
        alpha=2,  # CIFAR-100's; the paper's for this data set are not in the released code
        beta=100,
    ),
)
