# Digits on photographs, 64 x 64 (tools/make_toy_data.py crops data/VOCcrops), and a narrow ResNet-50 (a quarter).
# It becomes the backbone of a detector in MMDetection or Detectron2 (selfkd convert-backbone). Minutes on a CPU.
_base_ = './digits.py'
model = dict(
    backbone=dict(type='ResNet', depth=50),
    head=dict(in_channels=512),
)
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=64, padding=6, padding_mode='reflect'),
    dict(type='PackInputs'),
]

train_dataloader = dict(dataset=dict(data_root='data/VOCcrops', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root='data/VOCcrops'))
val_evaluator = [dict(type='Accuracy', topk=(1,)), dict(type='selfkd_mmpretrain.CalibrationMetric')]
test_dataloader, test_evaluator = val_dataloader, val_evaluator

epochs = 14
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=2e-3, weight_decay=0.05))
param_scheduler = dict(milestones=[epochs * 2 // 3, epochs - 2])
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
