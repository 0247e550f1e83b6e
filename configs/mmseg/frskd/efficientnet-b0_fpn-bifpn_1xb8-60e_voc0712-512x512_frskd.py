_base_ = './efficientnet-b0_fpn-bifpn_1xb8-60e_voc0712-512x512_plain.py'
model = dict(type='selfkd_mmseg.FRSKDEncoderDecoder', self_teacher=dict(in_channels=[64] * 6, width=64))
