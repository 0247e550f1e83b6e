# MIT67 (indoor scenes) at 224 x 224. docs/data.md says how to prepare it.
_base_ = 'images_224.py'
data_preprocessor = dict(num_classes=67)
data = dict(type='CustomDataset', data_root='data/mit67', data_prefix='Images')
train_dataloader = dict(dataset=dict(**data, ann_file='train.txt'))
val_dataloader = dict(dataset=dict(**data, ann_file='test.txt'))
test_dataloader = val_dataloader
