# CS-KD's schedule. The released loop sets the rate after the epoch that it counts from 0: one epoch later than FRSKD's.
_base_ = './schedule_200e.py'
param_scheduler = dict(milestones=[101, 151])
