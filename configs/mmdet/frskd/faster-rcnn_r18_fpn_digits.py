_base_ = '../baseline/faster-rcnn_r18_fpn_digits.py'
model = dict(roi_head=dict(type='selfkd_mmdet.FRSKDRoIHead'))
