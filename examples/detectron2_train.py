"""PS-KD in Detectron2, in a training script of your own: a base class and one line of settings.

    python tools/make_toy_data.py voc data/VOCdevkit
    python examples/detectron2_train.py --config-file configs/detectron2/faster_rcnn_R_18_FPN_digits.yaml

Without a script of your own, `selfkd train-detectron2` does the same with any config.
"""

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup

from selfkd_detectron2 import SelfKDTrainer, add_selfkd_config
from selfkd_detectron2.train import register_voc  # this example's data


class Trainer(SelfKDTrainer):  # was: DefaultTrainer
    pass


args = default_argument_parser().parse_args()
cfg = get_cfg()
add_selfkd_config(cfg)  # before merge_from_file
cfg.VOC = CfgNode({'ROOT': '', 'CLASSES': []})
cfg.merge_from_file(args.config_file)
cfg.merge_from_list(['SELFKD.PSKD.ENABLED', True, *args.opts])
register_voc(cfg.VOC.ROOT, cfg.VOC.CLASSES)
default_setup(cfg, args)
trainer = Trainer(cfg)
trainer.resume_or_load(resume=args.resume)
trainer.train()
