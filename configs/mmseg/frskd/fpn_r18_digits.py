_base_ = '../baseline/fpn_r18_digits.py'
model = dict(type='selfkd_mmseg.FRSKDEncoderDecoder', self_teacher=dict(in_channels=[32] * 4, width=32, channels=32))
