# Out-of-distribution measures, CIFAR-100 against SVHN, of a PreAct ResNet-18 that any of the methods trained:
# mim test mmpretrain THIS_CONFIG --checkpoint work_dirs/NAME/epoch_300.pth
_base_ = '../pskd/preact-resnet18_1xb128-300e_cifar100_plain.py'
outside = dict(
    type='selfkd_mmpretrain.SVHN',
    data_root='data/svhn',
    pipeline=[dict(type='selfkd_mmpretrain.MarkOOD'), dict(type='PackInputs')],
)
test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[{{_base_.val_dataloader.dataset}}, outside],
        ignore_keys=['classes'],
    )
)
test_evaluator = dict(_delete_=True, type='selfkd_mmpretrain.OODMetric')
