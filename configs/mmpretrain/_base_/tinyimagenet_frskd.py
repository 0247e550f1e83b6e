# TinyImageNet with the mean and deviation of FRSKD's released loader, its own instead of ImageNet's.
_base_ = './tinyimagenet.py'
data_preprocessor = dict(mean=[122.451, 114.2655, 101.3625], std=[70.635, 68.6205, 71.9355])
