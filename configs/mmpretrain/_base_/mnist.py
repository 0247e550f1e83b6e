# 5,000 scans of MNIST (tools/make_toy_data.py mnist data/mnist) and a small ResNet: half a minute a run on a CPU.
_base_ = './digits.py'
model = dict(
    # As for photographs: the stem leaves a quarter of the image's sides, the three stages have maps of 7, 4 and 2.
    backbone=dict(type='ResNet', num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)),
    head=dict(in_channels=64),
)
data_preprocessor = dict(mean=[33.5] * 3, std=[78.7] * 3)  # of the training images

train_dataloader = dict(dataset=dict(data_root='data/mnist'))
# Settings are chosen by, and temperatures fitted on, images held out of the training data.
val_dataloader = dict(dataset=dict(data_root='data/mnist', data_prefix='holdout'))
test_dataloader = dict(dataset=dict(data_root='data/mnist'))

epochs = 8
param_scheduler = dict(milestones=[epochs // 2, epochs * 3 // 4])
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
