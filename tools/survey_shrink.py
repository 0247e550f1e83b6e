"""A config of a toolkit's zoo made small enough for the survey: generated images, no weights, two epochs of a step."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

from selfkd_mmengine.trial import forget_weights

SIZE = {'mmpretrain': 256, 'mmdet': 128, 'mmseg': 64}  # of the images, in pixels


def shrink(cfg: Config, toolkit: str, folder: str, scale: int = 1) -> Config:
    """The config with generated data in ``folder``, without pre-trained weights, for two epochs of one step.

    Above a ``scale`` of 1 images are so many times as large, for networks that need more places, and gradients clipped.
    """
    cfg = copy.deepcopy(cfg)
    forget_weights(cfg._cfg_dict)
    teacher = cfg.model.get('teacher_config')
    if isinstance(teacher, str):  # a path in the toolkit's own repository
        cfg.model.teacher_config = str(Path(__import__(toolkit).__file__).parent / '.mim' / teacher)
    # Its pooling windows are as large as the maps of this size.
    size = scale * (512 if 'LRASPPHead' in str(cfg.model.get('decode_head')) else SIZE[toolkit])
    if toolkit != 'mmpretrain':  # whose pipelines crop to the size that the network is made for
        _pad_less(cfg.model.get('data_preprocessor') or {}, size)
        if 'img_size' in (cfg.model.get('backbone') or {}):
            cfg.model.backbone.img_size = (size, size)
        _fewer_regions(cfg.model)
    classes = _find(cfg.model, 'num_classes') or 10
    loader = cfg.get('train_dataloader') or {}
    pipeline = _find(loader, 'pipeline') or cfg.get('train_pipeline') or []
    dataset = DATA[toolkit](Path(folder), int(classes), pipeline, size)
    if 'RepLKNet' in str(cfg.model):  # its 31 x 31 convolutions take minutes at the size of its crops, on a CPU
        dataset['pipeline'].insert(-1, dict(type='Resize', scale=(64, 64)))
    if len((cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}).get('mean') or '') == 1:
        dataset['pipeline'][0]['color_type'] = 'grayscale'
    cfg.train_dataloader = dict(
        batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset
    )
    if loader.get('collate_fn'):
        cfg.train_dataloader.collate_fn = loader['collate_fn']
    cfg.train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1000)
    for name in ('val', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{name}_{part}'] = None
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3))
    if scale > 1:
        cfg.optim_wrapper['clip_grad'] = dict(max_norm=1)
    cfg.param_scheduler, cfg.custom_hooks = None, []
    cfg.default_hooks = dict(checkpoint=None)
    cfg.merge_from_dict({'work_dir': str(folder), 'log_level': 'ERROR', 'randomness': dict(seed=0), 'load_from': None})
    cfg.launcher, cfg.resume, cfg.auto_scale_lr = 'none', False, None
    cfg.default_scope = cfg.get('default_scope') or toolkit
    return cfg


def _pad_less(preprocessor: dict, size: int) -> None:
    """Batches are padded, or resized, to the small images' size instead of the usual ones'."""
    for part in (preprocessor, *(preprocessor.get('batch_augments') or ())):
        for key in ('size', 'random_size_range'):
            if part.get(key):
                part[key] = (size, size)


def _fewer_regions(part) -> None:
    """Of an image 32 regions are trained, of 64 proposals: with the usual 512 of 1000 a step takes half a minute."""
    if isinstance(part, dict):
        if 'pos_fraction' in part:
            part['num'] = 32
        if 'max_per_img' in part:
            part['max_per_img'] = 64
    for child in part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ():
        _fewer_regions(child)


def _find(node, key: str):
    """The first value of a key in nested dicts and lists, nearest the top."""
    level = [node]
    while level:
        for child in level:
            if isinstance(child, dict) and child.get(key):
                return child[key]
        level = [
            grandchild
            for child in level
            if isinstance(child, (dict, list, tuple))
            for grandchild in (child.values() if isinstance(child, dict) else child)
        ]
    return None


def _image(path: Path, size: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _classification(folder: Path, classes: int, pipeline: list, size: int) -> dict:
    for i in range(2):
        _image(folder / f'{i}.png', size, i)
    (folder / 'train.txt').write_text('0.png 1\n1.png 1\n')
    pipeline = [step for step in pipeline if step['type'] not in ('LoadImageFromFile', 'mmpretrain.LoadImageFromFile')]
    return dict(
        type='CustomDataset',
        data_root=str(folder),
        ann_file='train.txt',
        metainfo=dict(classes=[str(i) for i in range(classes)]),
        pipeline=[dict(type='LoadImageFromFile'), *pipeline],
    )


def _detection(folder: Path, classes: int, pipeline: list, size: int) -> dict:
    images, annotations = [], []
    for i in range(4):  # two steps an epoch: in its first one a snapshot is the model itself
        _image(folder / f'{i}.jpg', size, i)
        images.append(dict(id=i, file_name=f'{i}.jpg', height=size, width=size))
        Image.fromarray(np.zeros((size, size), np.uint8)).save(folder / f'{i}.png')
        for x, y, side, label in ((8, 8, 48, 1), (60, 56, 64, 1), (20, 70, 30, 2)):
            box = dict(bbox=[x, y, side, side], area=side * side, iscrowd=0, image_id=i)
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            annotations.append(dict(box, id=len(annotations), category_id=label, segmentation=[corners]))
    categories = [dict(id=i, name=str(i)) for i in range(classes)]
    file = dict(images=images, annotations=annotations, categories=categories)
    (folder / 'train.json').write_text(json.dumps(file))
    kinds = ' '.join(step['type'] for step in pipeline if isinstance(step, dict) and 'type' in step)
    load = next((step for step in pipeline if isinstance(step, dict) and step.get('type') == 'LoadAnnotations'), {})
    parts = {part: bool(load.get(part) or 'Panoptic' in kinds) for part in ('with_mask', 'with_seg')}
    steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, **parts)]
    dataset = dict(
        type='CocoDataset',
        data_root=str(folder),
        ann_file='train.json',
        data_prefix=dict(img='', seg=''),
        metainfo=dict(classes=[str(i) for i in range(classes)]),
    )
    if 'LoadProposals' in kinds:
        proposals = dict(bboxes=np.array([[8, 8, 60, 60], [50, 50, 120, 120]]), scores=np.ones(2))
        (folder / 'proposals.pkl').write_bytes(pickle.dumps({f'{folder.name}/{i}.jpg': proposals for i in range(4)}))
        dataset['proposal_file'] = 'proposals.pkl'
        steps.append(dict(type='LoadProposals'))
    return dict(dataset, pipeline=[*steps, dict(type='PackDetInputs')])


def _segmentation(folder: Path, classes: int, pipeline: list, size: int) -> dict:
    for i in range(2):
        _image(folder / 'images' / f'{i}.jpg', size, i)
        labels = np.random.RandomState(i).randint(0, min(classes, 5), (8, 8)).astype(np.uint8)
        (folder / 'labels').mkdir(exist_ok=True)
        Image.fromarray(labels).resize((size, size), Image.NEAREST).save(folder / 'labels' / f'{i}.png')
    keep = [step for step in pipeline if step.get('type') in ('GenerateEdge',)]
    return dict(
        type='BaseSegDataset',
        data_prefix=dict(img_path=str(folder / 'images'), seg_map_path=str(folder / 'labels')),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        metainfo=dict(classes=[str(i) for i in range(classes)]),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), *keep, dict(type='PackSegInputs')],
    )


DATA = {'mmpretrain': _classification, 'mmdet': _detection, 'mmseg': _segmentation}
