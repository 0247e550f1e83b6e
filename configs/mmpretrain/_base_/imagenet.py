# ImageNet (ILSVRC 2012) at 224 x 224. docs/data.md says how to prepare it.
_base_ = 'images_224.py'
data_preprocessor = dict(num_classes=1000)
data = dict(type='ImageNet', data_root='data/imagenet')
train_dataloader = dict(batch_size=256, dataset=dict(**data, split='train'))
val_dataloader = dict(dataset=dict(**data, split='val'))
test_dataloader = val_dataloader
