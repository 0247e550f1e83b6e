_base_ = './efficientnet-b2_fpn-bifpn_1xb16-60e_voc0712-512x512_plain.py'
model = dict(
    type='selfkd_mmseg.FRSKDEncoderDecoder',
    self_teacher=dict(type='selfkd_mmseg.EfficientDetSelfTeacher'),
)
