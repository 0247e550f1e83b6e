_base_ = '../baseline/fpn_r18_digits.py'
model = dict(type='selfkd_mmseg.FRSKDEncoderDecoder', self_teacher=dict(width=32, channels=32))
