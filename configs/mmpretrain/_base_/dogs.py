# Stanford Dogs at 224 x 224. docs/data.md says how to prepare it.
_base_ = 'images_224.py'
data_preprocessor = dict(num_classes=120)
data = dict(type='CustomDataset', data_root='data/stanford_dogs', data_prefix='Images')
train_dataloader = dict(dataset=dict(**data, ann_file='train.txt'))
val_dataloader = dict(dataset=dict(**data, ann_file='test.txt'))
test_dataloader = val_dataloader
