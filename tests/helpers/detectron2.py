"""Small real runs of Detectron2 over the digits. What imports this is skipped where Detectron2 is not installed."""

import itertools
import json
import weakref
from pathlib import Path

import pytest

from helpers import ROOT

pytest.importorskip('detectron2', reason='Detectron2 is not installed (docs/detectron2.md)')

import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.engine import HookBase, SimpleTrainer, TrainerBase, create_ddp_model
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.meta_arch import FCOS
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead
from detectron2.solver import build_optimizer
from detectron2.structures import PolygonMasks
from detectron2.utils import comm

from selfkd_detectron2 import PSKDHook, selfkd_hooks, with_self_teacher
from selfkd_detectron2 import train as script

CONFIG = ROOT / 'configs/detectron2/faster_rcnn_R_18_FPN_digits.yaml'
TINY = """
    MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.STEM_OUT_CHANNELS 8
    MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.FPN.OUT_CHANNELS 16 MODEL.FPN.NORM '' MODEL.RPN.CONV_DIMS [16]
    MODEL.ROI_BOX_HEAD.NORM '' MODEL.ROI_BOX_HEAD.NUM_CONV 0 MODEL.ROI_BOX_HEAD.NUM_FC 2 MODEL.ROI_BOX_HEAD.FC_DIM 32
    MODEL.ANCHOR_GENERATOR.SIZES [[16],[32],[64],[128],[256]] MODEL.ROI_HEADS.POSITIVE_FRACTION 0.25
    MODEL.RPN.POST_NMS_TOPK_TRAIN 20 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SOLVER.IMS_PER_BATCH 2
    SOLVER.MAX_ITER 6 SOLVER.STEPS () SOLVER.WARMUP_ITERS 1 SOLVER.CHECKPOINT_PERIOD 3 DATASETS.TEST ()
"""
MODELS = {
    'faster': '',
    'mask': 'MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.CONV_DIM 8 MODEL.ROI_MASK_HEAD.NUM_CONV 1',
    'cascade': 'MODEL.ROI_HEADS.NAME CascadeROIHeads MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True',
    'c4': """MODEL.BACKBONE.NAME build_resnet_backbone MODEL.RESNETS.OUT_FEATURES ["res4"]
        MODEL.RPN.IN_FEATURES ["res4"] MODEL.RPN.CONV_DIMS [-1] MODEL.ANCHOR_GENERATOR.SIZES [[16,32]]
        MODEL.ROI_HEADS.IN_FEATURES ["res4"] MODEL.ROI_HEADS.NAME Res5ROIHeads""",
    'retinanet': """MODEL.META_ARCHITECTURE RetinaNet MODEL.BACKBONE.NAME build_retinanet_resnet_fpn_backbone
        MODEL.RESNETS.OUT_FEATURES ["res3","res4","res5"] MODEL.FPN.IN_FEATURES ["res3","res4","res5"]
        MODEL.RETINANET.NUM_CLASSES 10 MODEL.RETINANET.NUM_CONVS 1""",
}
MODELS['panoptic'] = f"""{MODELS['mask']} MODEL.META_ARCHITECTURE PanopticFPN MODEL.SEM_SEG_HEAD.NUM_CLASSES 11
    MODEL.SEM_SEG_HEAD.CONVS_DIM 8 MODEL.SEM_SEG_HEAD.NORM ''"""
MODELS['cascade mask'] = f'{MODELS["cascade"]} {MODELS["mask"]}'
MODELS['fcos'] = MODELS['retinanet']
PSKD = 'SELFKD.PSKD.ENABLED True SELFKD.PSKD.INTERVAL 3 '  # alpha grows to 0.8
CSKD = 'SELFKD.CSKD.ENABLED True '
FRSKD = 'SELFKD.FRSKD.ENABLED True '
DROPOUT = 'MODEL.ROI_BOX_HEAD.NAME DropoutHead '


def config(voc, out, model='faster', options=''):
    """A tiny detector, batches of 2 images of 64 x 64, 6 iterations. Options are those of the command line."""
    cfg = script.base_config()
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list(f'{TINY} {MODELS[model]} {options}'.split())
    cfg.VOC.ROOT, cfg.OUTPUT_DIR = str(voc / 'VOC2007'), str(out)
    script.register_voc(cfg.VOC.ROOT, cfg.VOC.CLASSES)
    return cfg


def batches(cfg):
    """Two batches of two real images; their masks are the boxes, their semantic maps mean nothing."""
    mapper = DatasetMapper(cfg, is_train=True, augmentations=[T.ResizeShortestEdge(64)])
    samples = [mapper(x) for x in load_voc_instances(cfg.VOC.ROOT, 'trainval', cfg.VOC.CLASSES)]
    for sample in samples:
        boxes = sample['instances'].gt_boxes.tensor[:, [0, 1, 2, 1, 2, 3, 0, 3]].tolist()
        sample['instances'].gt_masks = PolygonMasks([[box] for box in boxes])
        sample['sem_seg'] = sample['image'].sum(0).remainder(11).long()
    return [samples[:2], samples[2:4]]


@ROI_BOX_HEAD_REGISTRY.register()
class DropoutHead(FastRCNNConvFCHead):
    """A box head with noise in training mode."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Cycle:
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return itertools.cycle(self.items)


class Trainer(script.Trainer):
    """The script's trainer, over the same batches in the same order: Detectron2 restores neither order nor seeds."""

    @classmethod
    def build_train_loader(cls, cfg):
        return Cycle(batches(cfg))


class FCOSTrainer(Trainer):
    @classmethod
    def build_model(cls, cfg):
        backbone = build_backbone(cfg)
        shapes = list(backbone.output_shape().values())
        head = FCOSHead(input_shape=shapes, num_classes=10, conv_dims=[16])
        mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
        return FCOS(backbone=backbone, head=head, num_classes=10, pixel_mean=mean, pixel_std=std)


class Reseed(HookBase):
    """Makes the random choice of regions a matter of the iteration alone."""

    def before_step(self):
        torch.manual_seed(self.trainer.iter)


class ValidationLoss(HookBase):
    """The usual way to log a validation loss: after a step, the detector's losses of other images, in training mode."""

    def __init__(self, gradients):
        self.losses, self.gradients = [], gradients

    def after_step(self):
        model = self.trainer.model
        torch.manual_seed(0)  # the detector draws regions
        normalizer, model.loss_normalizer = getattr(model, 'loss_normalizer', None), 100  # RetinaNet's is a running one
        with torch.set_grad_enabled(self.gradients):
            losses = model(batches(self.trainer.cfg)[1][:1])
        model.loss_normalizer = normalizer
        self.losses.append({name: float(loss) for name, loss in losses.items()})


class ValidatingTrainer(Trainer):
    """Has the validation loss among its own hooks, ahead of those of ``cfg.SELFKD``."""

    def build_hooks(self):
        self.validation = ValidationLoss(gradients=True)
        return [*super().build_hooks(), self.validation]


class OwnTrainer(Trainer):
    """With an ``__init__`` of its own in place of DefaultTrainer's, as projects have that make an average of the model,
    say."""

    def __init__(self, cfg):
        TrainerBase.__init__(self)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = SimpleTrainer(model, self.build_train_loader(cfg), optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())


class AutocastTrainer(Trainer):
    """Losses in mixed precision, without learning: on a CPU Detectron2 gets NaN in vanilla training, too."""

    def run_step(self):
        with torch.autocast('cpu', torch.bfloat16):
            losses = self.model(next(self._trainer._data_loader_iter))
        self._trainer.iter = self.iter
        self._trainer._write_metrics(losses, 0.0)


def train(cfg, *hooks, model='faster', resume=False, kind=Trainer):
    kind = FCOSTrainer if model == 'fcos' else kind
    torch.manual_seed(0)
    trainer = kind(cfg)
    trainer.register_hooks(list(hooks))
    trainer.resume_or_load(resume=resume)
    torch.manual_seed(1)
    trainer.train()
    return trainer


def load(cfg, file, model='faster'):
    """The config's detector with the weights of a checkpoint, loaded strictly."""
    detector = FCOSTrainer.build_model(cfg) if model == 'fcos' else build_model(with_self_teacher(cfg))
    detector.load_state_dict(torch.load(file)['model'], strict=True)
    return detector.eval()


def lazy_loader(voc, dataset=None):
    """The batches, for a LazyConfig, which names the data set as Detectron2's loader would have it."""
    return Cycle(batches(config(Path(voc), '')))


def scalars(out):
    """The logs of a run, by iteration."""
    logs = {}
    for line in (Path(out) / 'metrics.json').read_text().splitlines():
        line = json.loads(line)
        logs.setdefault(line['iteration'], {}).update(line)
    return logs


def two_processes(voc, out, methods, rank):
    """What each of two processes trains, on another batch; what it ends with is saved."""
    torch.distributed.init_process_group('gloo')
    comm.create_local_process_group(comm.get_world_size())
    for name, options in methods.items():
        cfg = config(voc, out, options=options)
        torch.manual_seed(0)
        model = build_model(with_self_teacher(cfg))
        optimizer = build_optimizer(cfg, model)
        model = create_ddp_model(model, device_ids=None, broadcast_buffers=False)
        trainer = SimpleTrainer(model, Cycle([batches(cfg)[rank]]), optimizer)
        hooks = selfkd_hooks(cfg)
        trainer.register_hooks(hooks)
        trainer.train(0, 6)
        teacher = hooks[0].teacher.state_dict() if 'PSKD' in options else {}
        torch.save({'model': model.module.state_dict(), 'teacher': teacher}, out / f'{name}{rank}.pth')
    torch.save(default_period(cfg), out / f'period{rank}.pth')


def default_period(cfg):
    """After how many iterations the past copy is refreshed by default, with Detectron2's own data loader."""
    hook = PSKDHook()
    trainer = SimpleTrainer(build_model(cfg), build_detection_train_loader(cfg), None)
    trainer.register_hooks([hook])
    trainer.max_iter = cfg.SOLVER.MAX_ITER
    trainer.before_train()
    return hook.period
