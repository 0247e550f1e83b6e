# CUB-200-2011 at 224 x 224. docs/data.md says how to prepare it.
_base_ = 'images_224.py'
data_preprocessor = dict(num_classes=200)
data = dict(type='CUB', data_root='data/CUB_200_2011')
train_dataloader = dict(dataset=dict(**data, split='train'))
val_dataloader = dict(dataset=dict(**data, split='test'))
test_dataloader = val_dataloader
