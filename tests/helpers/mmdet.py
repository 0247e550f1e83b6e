"""Small real MMDetection runs over digits on photographs, for selfkd_mmdet's tests."""

import torch
from mmcv.transforms import BaseTransform
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads import SingleRoIExtractor
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.hub import get_config

from helpers import ROOT
from helpers.mmengine import place

PSKD = dict(type='selfkd_mmdet.PSKDHook', alpha=0.8)
CSKD = dict(type='selfkd_mmdet.CSKDHook', weight=0.5, temperature=3.0)
FRSKD = {'model.roi_head.type': 'selfkd_mmdet.FRSKDRoIHead'}


def config(voc, work_dir, *hooks, model='faster-rcnn', **options) -> Config:
    """The toy config: 4 images of 64 x 64, batches of 2, 2 epochs; no region is sampled at random.

    ``model`` is faster-rcnn or retinanet, or what replaces the toy Faster R-CNN: cascade, mask, cascade mask, c4,
    dynamic, mask scoring, point rend, sabl, double head, pisa, seesaw, sigmoid, sparse, fcos, atss, rtmdet, yolox, ssd,
    tood, solo, deformable detr.
    """
    name = model if model in ('faster-rcnn', 'retinanet') else 'faster-rcnn'
    cfg = Config.fromfile(ROOT / f'configs/mmdet/baseline/{name}_r18_fpn_digits.py')
    cfg.merge_from_dict(
        {
            'train_dataloader.batch_size': 2,
            'train_cfg.max_epochs': 2,
            'train_cfg.val_begin': 100,
            'default_hooks.checkpoint.max_keep_ckpts': 5,
        }
    )
    place(cfg, voc, work_dir)
    if name == 'faster-rcnn':
        cfg.model.train_cfg.rpn.sampler.num = 10**6
        cfg.model.train_cfg.rcnn.sampler.num = 10**4
        cfg.model.train_cfg.rpn_proposal.max_per_img = 20
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='Resize', scale=(64, 64)))
    if model != name:
        MODIFY[model](cfg)
    cfg.merge_from_dict(options)
    cfg.custom_hooks = [ConfigDict(hook) for hook in hooks]
    return cfg


def cascade(cfg) -> None:
    model = cfg.model
    model.type, head = 'CascadeRCNN', model.roi_head
    head.type, head.num_stages, head.stage_loss_weights = 'CascadeRoIHead', 2, [1, 0.5]
    head.bbox_head.reg_class_agnostic = True
    head.bbox_head = [head.bbox_head, head.bbox_head]
    model.train_cfg.rcnn = [model.train_cfg.rcnn] * 2


def mask(cfg) -> None:
    cfg.model.type = 'MaskRCNN'
    cfg.model.roi_head.update(
        mask_roi_extractor={
            **cfg.model.roi_head.bbox_roi_extractor,
            'roi_layer': dict(type='RoIAlign', output_size=14),
        },
        mask_head=dict(type='FCNMaskHead', num_convs=1, in_channels=32, conv_out_channels=8, num_classes=10),
    )
    cfg.model.train_cfg.rcnn.mask_size, cfg.model.test_cfg.rcnn.mask_thr_binary = 28, 0.5
    cfg.train_dataloader.dataset.pipeline.insert(3, dict(type='BoxesAsMasks'))


def dynamic(cfg) -> None:
    """Dynamic R-CNN, whose overlaps for positives and whose box loss change after two iterations."""
    cfg.model.roi_head.type = 'DynamicRoIHead'
    cfg.model.roi_head.bbox_head.loss_bbox = ConfigDict(type='SmoothL1Loss', beta=1.0)
    cfg.model.train_cfg.rcnn.dynamic_rcnn = ConfigDict(
        iou_topk=75, beta_topk=10, update_iter_interval=2, initial_iou=0.4, initial_beta=1.0
    )


def mask_scoring(cfg) -> None:
    mask(cfg)
    cfg.model.type, cfg.model.roi_head.type = 'MaskScoringRCNN', 'MaskScoringRoIHead'
    small = dict(in_channels=32, conv_out_channels=8, fc_out_channels=8, num_classes=10)
    cfg.model.roi_head.mask_iou_head = ConfigDict(type='MaskIoUHead', num_convs=1, num_fcs=1, **small)
    cfg.model.train_cfg.rcnn.mask_thr_binary = 0.5


def point_rend(cfg) -> None:
    mask(cfg)
    full = get_config('mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py').model
    cfg.model.type, cfg.model.roi_head.type = 'PointRend', 'PointRendRoIHead'
    for name in ('mask_head', 'point_head', 'mask_roi_extractor'):
        cfg.model.roi_head[name] = full.roi_head[name]
    cfg.model.roi_head.mask_roi_extractor.out_channels = 32
    cfg.model.roi_head.mask_head.update(in_channels=32, conv_out_channels=32, fc_out_channels=32, num_classes=10)
    cfg.model.roi_head.point_head.update(in_channels=32, fc_channels=32, num_classes=10)
    for name in ('mask_size', 'num_points', 'oversample_ratio', 'importance_sample_ratio'):
        cfg.model.train_cfg.rcnn[name] = full.train_cfg.rcnn[name]


def sabl(cfg) -> None:
    """Side-aware boundary localisation: another box head in the same RoI head."""
    cfg.model.roi_head.bbox_head = get_config(
        'mmdet::sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py'
    ).model.roi_head.bbox_head
    cfg.model.roi_head.bbox_head.update(
        num_classes=10, cls_in_channels=32, reg_in_channels=32, reg_offset_out_channels=32
    )
    cfg.model.roi_head.bbox_head.update(reg_cls_out_channels=32, cls_out_channels=16)


def double_head(cfg) -> None:
    """Regions are read twice, the larger ones for the boxes."""
    cfg.model.roi_head.type, cfg.model.roi_head.reg_roi_scale_factor = 'DoubleHeadRoIHead', 1.3
    small = dict(num_convs=1, num_fcs=1, in_channels=32, conv_out_channels=16, fc_out_channels=16, num_classes=10)
    cfg.model.roi_head.bbox_head = ConfigDict(type='DoubleConvFCBBoxHead', roi_feat_size=7, **small)


def pisa(cfg) -> None:
    """Samples are weighed by their importance, which is found by calls of the loss module that are not trained on."""
    cfg.model.roi_head.type = 'PISARoIHead'
    cfg.model.roi_head.bbox_head.loss_bbox = ConfigDict(type='SmoothL1Loss', beta=1.0)
    cfg.model.train_cfg.rcnn.update(isr=dict(k=2, bias=0), carl=dict(k=1, bias=0.2))
    cfg.model.train_cfg.rcnn.sampler.update(type='ScoreHLRSampler', k=0.5, bias=0.0)


def seesaw(cfg) -> None:
    """The softmax of classes and that of objectness, beside each other."""
    cfg.model.roi_head.bbox_head.loss_cls = ConfigDict(type='SeesawLoss', num_classes=10)


def sigmoid(cfg) -> None:
    cfg.model.roi_head.bbox_head.loss_cls = ConfigDict(type='CrossEntropyCustomLoss', num_classes=10, use_sigmoid=True)


def sparse(cfg) -> None:
    """Sparse R-CNN: learnt regions, each with features of its own, classified by sigmoids."""
    full = get_config('mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py').model
    full.rpn_head.update(num_proposals=12, proposal_feature_channel=32)
    full.roi_head.update(num_stages=2, stage_loss_weights=[1, 0.5], proposal_feature_channel=32)
    full.roi_head.bbox_roi_extractor = cfg.model.roi_head.bbox_roi_extractor
    full.roi_head.bbox_head, full.train_cfg.rcnn = full.roi_head.bbox_head[:2], full.train_cfg.rcnn[:2]
    for head in full.roi_head.bbox_head:
        head.update(num_classes=10, in_channels=32, feedforward_channels=32, num_heads=4)
        head.dynamic_conv_cfg.update(in_channels=32, feat_channels=8, out_channels=32)
    full.test_cfg.rcnn.max_per_img = 12
    for name in ('backbone', 'neck', 'data_preprocessor'):
        full.pop(name)
        full[name] = cfg.model[name]
    cfg.model = full


def c4(cfg) -> None:
    """Regions from one map of the backbone, whose last stage is the head's; as mmdet's faster-rcnn_r50-caffe-c4."""
    model = cfg.model
    model.backbone.update(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,))
    del model['neck']
    model.rpn_head.update(in_channels=64, anchor_generator=dict(type='AnchorGenerator', scales=[2, 4], strides=[16]))
    model.rpn_head.anchor_generator.ratios = [1.0]
    model.roi_head.bbox_roi_extractor.update(out_channels=64, featmap_strides=[16])
    model.roi_head.shared_head = dict(type='HalvingLayer')
    model.roi_head.bbox_head = ConfigDict(
        type='BBoxHead', with_avg_pool=True, roi_feat_size=4, in_channels=128, num_classes=10
    )


def dense(kind: str):
    def modify(cfg):
        full = get_config(f'mmdet::{kind}').model
        cfg.model.type, cfg.model.bbox_head = full.type, full.bbox_head
        cfg.model.bbox_head.update(num_classes=10, in_channels=32, feat_channels=8, stacked_convs=1)
        cfg.model.bbox_head.norm_cfg = dict(type='GN', num_groups=2)
        cfg.model.train_cfg, cfg.model.test_cfg = full.get('train_cfg'), full.test_cfg
        for name in ('rpn_head', 'roi_head'):
            del cfg.model[name]
        cfg.model.neck.num_outs = 5

    return modify


def one_stage(kind: str, **options):
    """The head, losses and assigner of a config of MMDetection's, on three small maps (strides 8, 16, 32)."""

    def modify(cfg):
        full = get_config(f'mmdet::{kind}').model
        cfg.model.type, cfg.model.bbox_head = full.type, full.bbox_head
        for name, value in dict(num_classes=10, **options).items():
            cfg.model.bbox_head.pop(name, None)  # or it would be merged
            cfg.model.bbox_head[name] = value
        cfg.model.train_cfg, cfg.model.test_cfg = full.get('train_cfg'), full.test_cfg
        cfg.model.data_preprocessor.batch_augments = None
        for name in ('rpn_head', 'roi_head'):
            del cfg.model[name]
        cfg.model.neck.update(start_level=1, num_outs=3)
        if full.type == 'RTMDet':
            cfg.model.use_syncbn = False  # which torch has for GPUs alone

    return modify


SMALL = dict(in_channels=32, feat_channels=8, stacked_convs=1, norm_cfg=dict(type='GN', num_groups=2))


def ssd(cfg) -> None:
    anchors = dict(type='SSDAnchorGenerator', scale_major=False, input_size=64, strides=[8, 16, 32])
    anchors.update(min_sizes=[10, 20, 40], max_sizes=[20, 40, 60], ratios=[[2], [2], [2]])
    one_stage('ssd/ssd300_coco.py', in_channels=(32, 32, 32), anchor_generator=anchors)(cfg)


def tood(cfg) -> None:
    """Whose head gives probabilities."""
    anchors = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16, 32])
    one_stage('tood/tood_r50_fpn_1x_coco.py', **{**SMALL, 'stacked_convs': 2}, anchor_generator=anchors)(cfg)


def solo(cfg) -> None:
    """Masks, each with the classes of a cell of a grid."""
    mask(cfg)
    small = dict(SMALL, num_classes=10, num_grids=[8, 6, 4, 3, 2])
    cfg.model.mask_head = ConfigDict({**get_config('mmdet::solo/solo_r50_fpn_1x_coco.py').model.mask_head, **small})
    cfg.model.type, cfg.model.train_cfg, cfg.model.test_cfg = 'SOLO', None, dict(score_thr=0.1)
    for name in ('rpn_head', 'roi_head'):
        del cfg.model[name]
    cfg.model.neck.update(num_outs=5)


def deformable_detr(cfg) -> None:
    full = get_config('mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py').model
    for part in (full.encoder, full.decoder):
        part.num_layers = 2
        part.layer_cfg.self_attn_cfg.embed_dims = 32
        part.layer_cfg[('self' if part is full.encoder else 'cross') + '_attn_cfg'].num_levels = 3
        part.layer_cfg.ffn_cfg.update(embed_dims=32, feedforward_channels=32, ffn_drop=0.0)
        for attention in ('self_attn_cfg', 'cross_attn_cfg'):
            if attention in part.layer_cfg:  # mmengine does not restore random states, so a resumed run draws others
                part.layer_cfg[attention].dropout = 0.0
    full.decoder.layer_cfg.cross_attn_cfg.embed_dims = 32
    full.positional_encoding.num_feats, full.bbox_head.num_classes, full.bbox_head.embed_dims = 16, 10, 32
    full.num_queries, full.num_feature_levels = 12, 3
    for name in ('backbone', 'neck', 'data_preprocessor'):
        full.pop(name)
        full[name] = cfg.model[name]
    full.neck.update(start_level=1, num_outs=3)
    cfg.model = full


MODIFY = {
    'cascade': cascade,
    'mask': mask,
    'cascade mask': lambda cfg: (mask(cfg), cascade(cfg)),
    'c4': c4,
    'dynamic': dynamic,
    'mask scoring': mask_scoring,
    'point rend': point_rend,
    'sabl': sabl,
    'double head': double_head,
    'pisa': pisa,
    'seesaw': seesaw,
    'sigmoid': sigmoid,
    'sparse': sparse,
    'fcos': dense('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),
    'atss': dense('atss/atss_r50_fpn_1x_coco.py'),
    'rtmdet': one_stage('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', **SMALL),
    'yolox': one_stage('yolox/yolox_s_8xb8-300e_coco.py', **{**SMALL, 'stacked_convs': 1}),
    'ssd': ssd,
    'tood': tood,
    'solo': solo,
    'deformable detr': deformable_detr,
}


@MODELS.register_module(force=True)  # pytest also imports this file by its path, looking for doctests
class HalvingLayer(torch.nn.Module):
    """The last stage of a C4 detector, one convolution of it."""

    def __init__(self, **kwargs):
        super().__init__()
        self.conv = torch.nn.Conv2d(64, 128, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x).relu()


@TRANSFORMS.register_module(force=True)
class BoxesAsMasks(BaseTransform):
    """Masks that fill the boxes."""

    def transform(self, results):
        height, width = results['img_shape']
        masks = torch.zeros(len(results['gt_bboxes']), height, width, dtype=torch.uint8)
        for m, (x1, y1, x2, y2) in zip(masks, results['gt_bboxes'].tensor.round().int().tolist()):
            m[y1:y2, x1:x2] = 1
        results['gt_masks'] = BitmapMasks(masks.numpy(), height, width)
        return results


@TRANSFORMS.register_module(force=True)
class OneClass(BaseTransform):
    """All objects are of class 0."""

    def transform(self, results):
        results['gt_bboxes_labels'] = results['gt_bboxes_labels'] * 0
        return results


class Regions(Hook):
    """Keeps, for each training step: the inputs, regions, what went through the loss modules, and the logs.

    ``calls`` holds logits, labels, weights and normalisation; logits.grad is that of the step. ``objects``, for each
    call, which of its image's objects each region was assigned to (-1: background).
    """

    priority = 'VERY_HIGH'

    def __init__(self):
        self.steps, self.training = [], False

    def before_train(self, runner):
        model = runner.model
        model.register_forward_pre_hook(self._inputs, with_kwargs=True)
        extractors = model.roi_head.bbox_roi_extractor
        for extractor in extractors if isinstance(extractors, torch.nn.ModuleList) else [extractors]:
            extractor.register_forward_pre_hook(self._rois)
        for bbox_head in bbox_heads(model):
            bbox_head.register_forward_pre_hook(self._feats)
            bbox_head.loss_cls.register_forward_hook(self._loss, with_kwargs=True)
        samplers = model.roi_head.bbox_sampler
        for sampler in samplers if isinstance(samplers, list) else [samplers]:
            sampler.sample = self._sampled(sampler.sample)
        self.assigned = []

    def _sampled(self, sample):
        def watched(*args, **kwargs):
            found = sample(*args, **kwargs)
            result = found[0] if isinstance(found, tuple) else found  # PISA's come with weights
            background = result.pos_assigned_gt_inds.new_full((len(result.neg_priors),), -1)
            self.assigned.append(torch.cat([result.pos_assigned_gt_inds, background]))
            return found

        return watched

    def _inputs(self, model, args, kwargs):
        self.training = kwargs['mode'] == 'loss'
        if self.training:
            step = dict(inputs=kwargs['inputs'].clone(), rois=[], calls=[], objects=[], plain=[], feats=None)
            self.steps.append(dict(step, metas=[sample.metainfo for sample in kwargs['data_samples']]))

    def _rois(self, module, args):
        if self.training and torch.is_grad_enabled():
            self.steps[-1]['rois'].append(args[1].clone())

    def _feats(self, bbox_head, args):
        if self.training and len(args) > 1 and self.steps[-1]['feats'] is None:
            self.steps[-1]['feats'] = args[1].detach().clone()  # of Sparse R-CNN's regions

    def _loss(self, module, args, kwargs, output):
        if kwargs.get('reduction_override') == 'none':  # PISA looks for hard samples
            return
        logits, label, weight = args
        logits.retain_grad()
        self.steps[-1]['calls'].append((logits, label, weight, kwargs['avg_factor']))
        self.steps[-1]['plain'].append(float(sum(output.values()) if isinstance(output, dict) else output))
        self.steps[-1]['objects'].append(torch.cat(self.assigned))
        self.assigned = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1].update(epoch=runner.epoch, outputs={k: v.item() for k, v in outputs.items() if v.numel() == 1})


def bbox_heads(model):
    heads = model.roi_head.bbox_head
    return list(heads) if isinstance(heads, torch.nn.ModuleList) else [heads]


class StopAfter(Hook):
    """Ends training after so many epochs or iterations, without changing the totals that the schedule depends on."""

    priority = 'LOWEST'

    def __init__(self, count):
        self.count = count

    def after_train_epoch(self, runner):
        runner.train_loop.stop_training |= runner.epoch + 1 == self.count

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.max_epochs == 1:  # iteration-based
            runner.train_loop.stop_training |= runner.iter + 1 == self.count


@MODELS.register_module(force=True)
class Float32RoIExtractor(SingleRoIExtractor):
    """Reads regions in float32, also under autocast."""

    def forward(self, feats, rois, **kwargs):
        return super().forward(tuple(feat.float() for feat in feats), rois.float(), **kwargs)


@MODELS.register_module(force=True)
class Float32RPNHead(RPNHead):
    """Proposes in float32, also under autocast."""

    def forward_single(self, x):
        with torch.autocast('cpu', enabled=False):
            return super().forward_single(x.float())


def bfloat16(monkeypatch, cfg) -> None:
    """Mixed precision on the CPU: mmengine's wrapper does not expect it, mmcv's RoIAlign and NMS do not compute it."""
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
    if 'roi_head' in cfg.model:
        cfg.model.rpn_head.type = 'Float32RPNHead'
        cfg.model.roi_head.bbox_roi_extractor.type = 'Float32RoIExtractor'  # the self-teacher's, too
