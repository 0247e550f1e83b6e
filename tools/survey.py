"""Trains a config of every family in a toolkit's own zoo, plain and with each method, and writes what came out.

    python tools/survey.py mmpretrain [FAMILY ...] [--write docs/support.md]

Needs no data and no GPU. Outcomes are kept as JSON, so that it can be interrupted and goes on where it was.

A config stays as it is but for what a small machine without data cannot have: its data are a few generated images, its
pre-trained weights and schedule are left out. It trains two steps, of an epoch each, plain and with each method.
"""

import argparse
import copy
import datetime
import importlib.metadata
import json
import os
import platform
import re
import signal
import tempfile
import time
import traceback
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from PIL import Image

from selfkd.benchmark import write_section
from selfkd.files import replacing
from selfkd_mmengine.train import refuse_ignored

METHODS: Dict[str, Dict[str, dict]] = {
    'mmpretrain': {
        'PS-KD': {'default_hooks.pskd.type': 'selfkd_mmpretrain.PSKDHook'},
        'PS-KD, snapshot': {
            'default_hooks.pskd.type': 'selfkd_mmpretrain.PSKDHook',
            'default_hooks.pskd.teacher': 'snapshot',
        },
        'CS-KD': {'default_hooks.cskd.type': 'selfkd_mmpretrain.CSKDHook'},
        'FRSKD': {'model.type': 'selfkd_mmpretrain.FRSKDImageClassifier'},
    },
    'mmdet': {
        'PS-KD': {'default_hooks.pskd.type': 'selfkd_mmdet.PSKDHook'},
        'CS-KD': {'default_hooks.cskd.type': 'selfkd_mmdet.CSKDHook'},
        'FRSKD': {'model.roi_head.type': 'selfkd_mmdet.FRSKDRoIHead'},
    },
    'mmseg': {
        'PS-KD': {'default_hooks.pskd.type': 'selfkd_mmseg.PSKDHook'},
        'FRSKD': {'model.type': 'selfkd_mmseg.FRSKDEncoderDecoder', 'model.self_teacher.warmup': 0.0},
    },
}
LEFT_OUT = ('benchmarks', 'deploy')
SMALL = ('atto', 'nano', 'tiny', 'x0-', '_xs', 'xxs', 'b0', '-s0', '050', 'r18', 'small', '_s_', '-s_', 'resnet18')
SMALL += ('r34', 'd20', '-t_', '_t_', 'a0', 'b1', '400mf', 'r50', 'resnet50', 'base', '-b_', 'p16', 'r101', 'large')
# Taken only if a family has no other.
UNUSUAL = ('headless', 'zeroshot', '_voc', '-g-', 'levir', '-XL_', 'dpool', '-rpn_r50', 'fast-rcnn', 'upernet_r18')
SIZE = {'mmpretrain': 256, 'mmdet': 128, 'mmseg': 64}  # of the images, in pixels
OURS = r'(?:PSKDHook|CSKDHook|FRSKD\w+|self_teacher|SelfTeacher)'  # what a refusal of ours begins with
SECONDS = 1200  # for one training of two steps


class Outcome(NamedTuple):
    """How a training of two steps ended.

    Attributes:
        losses: what each step logged, name -> value; fewer than two where it ended early.
        error: the message it ended with, or None.
    """

    losses: List[Dict[str, float]]
    error: Optional[str] = None


def families(toolkit: str, names: Sequence[str] = ()) -> Dict[str, str]:
    """A config of each family (or some) of the installed toolkit's zoo: the smallest by its name that has a model."""
    zoo, chosen = _zoo(toolkit), {}
    for folder in sorted(path for path in zoo.iterdir() if (path.name in names if names else path.name != '_base_')):
        paths = [path.relative_to(zoo) for path in folder.rglob('*.py')]
        paths = [path for path in paths if not any(part[0] == '_' or part in LEFT_OUT for part in path.parts)]
        for path in sorted(paths, key=_size):
            try:
                cfg = Config.fromfile(zoo / path)
            except Exception:  # some import what is not installed, or name files that are not there
                continue
            if {'type', 'backbone', 'detector', 'image_encoder'} & set(cfg.get('model') or ()):
                chosen[folder.name] = str(path)
                break
    return chosen


def _zoo(toolkit: str) -> Path:
    return Path(__import__(toolkit).__file__).parent / '.mim' / 'configs'


def _size(config: Path) -> tuple:
    name = config.name
    unusual = any(mark in name for mark in UNUSUAL)
    return unusual, next((i for i, mark in enumerate(SMALL) if mark in name), len(SMALL)), len(name), str(config)


def shrink(cfg: Config, toolkit: str, folder: str) -> Config:
    """The config with generated data in ``folder``, without pre-trained weights, for two epochs of one step."""
    cfg = copy.deepcopy(cfg)
    _forget_weights(cfg._cfg_dict)
    # Its pooling windows are as large as the maps of this size.
    size = 512 if 'LRASPPHead' in str(cfg.model.get('decode_head')) else SIZE[toolkit]
    if toolkit != 'mmpretrain':  # whose pipelines crop to the size that the network is made for
        _pad_less(cfg.model.get('data_preprocessor') or {}, size)
        if 'img_size' in (cfg.model.get('backbone') or {}):
            cfg.model.backbone.img_size = (size, size)
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
    cfg.param_scheduler, cfg.custom_hooks = None, []
    cfg.default_hooks = dict(checkpoint=None)
    cfg.merge_from_dict({'work_dir': str(folder), 'log_level': 'ERROR', 'randomness': dict(seed=0), 'load_from': None})
    cfg.launcher, cfg.resume, cfg.auto_scale_lr = 'none', False, None
    cfg.default_scope = cfg.get('default_scope') or toolkit
    return cfg


def train_two_steps(cfg: Config) -> Outcome:
    """Trains in a process of its own, which may crash or hang."""
    with tempfile.NamedTemporaryFile('r') as result:
        child = os.fork()
        if child == 0:
            _in_child(lambda: _train(cfg, result.name))
        deadline = time.time() + SECONDS
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.time() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Outcome([], f'took more than {SECONDS} seconds')
            time.sleep(0.05)
        text = result.read()
        return Outcome(**json.loads(text)) if text else Outcome([], 'the process died')


def _in_child(function: Callable) -> None:
    """Ends this process after the call, whatever it does."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    try:
        function()
    finally:
        os._exit(0)


def _train(cfg: Config, result: str) -> None:
    from mmengine.registry import RUNNERS  # noqa: F401  (registers the toolkit's scope)
    from mmengine.runner import Runner

    losses, error = [], None
    try:
        runner = Runner.from_cfg(cfg)
        refuse_ignored(cfg, runner.model)  # as `selfkd train` does
        runner.register_hook(_Losses(losses), priority='LOWEST')
        runner.train()
    except BaseException as problem:  # a toolkit may also exit
        where = traceback.extract_tb(problem.__traceback__)[-1]
        error = f'{type(problem).__name__}: {str(problem) or where.line}'
    Path(result).write_text(json.dumps({'losses': losses, 'error': error}))


class _Losses(Hook):
    def __init__(self, losses: list):
        self.losses = losses

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.losses.append(
            {name: float(value) for name, value in outputs.items() if torch.as_tensor(value).numel() == 1}
        )


def refusal(method: str, trained: Outcome) -> Optional[str]:
    """``refused: ...`` if the training was refused by name before its first step."""
    message = (trained.error or '').strip().split('\n')[0]
    ours = re.match(rf'\w+: (?:class `\w+` in \S+: )*({OURS}: .*)', message)
    if ours and not trained.losses:
        return f'refused: {ours[1]}'
    if method == 'FRSKD' and "unexpected keyword argument 'roi_head'" in message:
        return 'refused: by MMDetection, a detector without regions has no roi_head'
    return None


def classify(method: str, plain: Outcome, trained: Outcome) -> str:
    """What became of a training that was not refused: ``trains``, ``toolkit: ...`` (it cannot run the config here) or
    ``DEFECT: ...``."""
    message = (trained.error or '').strip().split('\n')[0]
    if plain.error:
        return 'toolkit: ' + plain.error.strip().split('\n')[0]
    if trained.error:
        return f'DEFECT: after {len(trained.losses)} steps {message}'
    if not all(np.isfinite(value) for step in plain.losses for name, value in step.items() if 'loss' in name):
        return 'toolkit: its plain loss is not finite here'
    first, last = (_total(trained.losses[i]) - _total(plain.losses[i]) for i in (0, -1))
    if method.startswith('PS-KD') and abs(first) > 1e-4 * abs(_total(plain.losses[0])):
        return f'DEFECT: the first step, without a past, differs from the plain one by {first:.2e}'
    # The quality focal loss from a past that has hardly changed is there, but lost in a sum of float32.
    acts = abs(last) > 1e-7 * abs(_total(plain.losses[-1])) or trained.losses[-1].get('pskd_soft', 0) > 0
    if not (np.isfinite(last) and acts):
        return f'DEFECT: the last loss differs from the plain one by {last:.2e}'
    return 'trains'


def _total(step: Dict[str, float]) -> float:
    """What was trained on: mmengine logs it as ``loss``, unless an entry of that name stands for itself."""
    parts = sum(value for name, value in step.items() if 'loss' in name and name != 'loss')
    loss = step.get('loss', parts)
    return loss if not parts or abs(loss - parts) < 1e-4 * abs(parts) else loss + parts


def survey(toolkit: str, names: Sequence[str] = (), *, report: Callable = print) -> Dict[str, Dict[str, str]]:
    """Family -> ``config``, and the outcome of each method.

    Args:
        toolkit: ``'mmpretrain'``, ``'mmdet'`` or ``'mmseg'``; its plugin must be importable.
        names: some families only.
        report: is given a line for each family.
    """
    from mmengine.utils import import_modules_from_strings

    import_modules_from_strings([f'{toolkit}.models', f'{toolkit}.datasets', f'selfkd_{toolkit}'])
    rows = {}
    for family, name in families(toolkit, names).items():
        started, rows[family] = time.time(), {'config': name}
        with tempfile.TemporaryDirectory() as folder:
            try:
                cfg = shrink(Config.fromfile(_zoo(toolkit) / name, format_python_code=False), toolkit, folder)
            except Exception as problem:  # a config that cannot even be read here
                rows[family].update(dict.fromkeys(METHODS[toolkit], f'toolkit: {type(problem).__name__}: {problem}'))
                continue
            plain = None
            for method, options in METHODS[toolkit].items():
                switched = copy.deepcopy(cfg)
                switched.merge_from_dict(options)
                trained = train_two_steps(switched)
                outcome = refusal(method, trained)
                if outcome is None:
                    plain = plain or train_two_steps(cfg)
                    outcome = classify(method, plain, trained)
                rows[family][method] = re.sub(r'\s+', ' ', outcome)
        report(f'{family} ({time.time() - started:.0f} s): ' + json.dumps(rows[family]))
    return rows


def table(rows: Dict[str, Dict[str, str]]) -> str:
    """Markdown: a row for each family, and below it the messages, numbered."""
    methods = [name for name in next(iter(rows.values())) if name != 'config']
    messages: Dict[str, int] = {}
    lines = ['| family | config | ' + ' | '.join(methods) + ' |', '| --- ' * (len(methods) + 2) + '|']
    for family, row in rows.items():
        cells = []
        for method in methods:
            kind, _, message = row[method].partition(': ')
            cells.append(f'{kind} [{messages.setdefault(row[method], len(messages) + 1)}]' if message else kind)
        lines.append(f'| {family} | `{Path(row["config"]).stem}` | ' + ' | '.join(cells) + ' |')
    lines += ['', *(f'{number}. {_escape(message)}' for message, number in messages.items())]
    return '\n'.join(lines)


def _escape(text: str) -> str:
    return re.sub(r'/\S*/', '', text)[:300].replace('<', '&lt;').replace('|', '\\|')


def _forget_weights(node) -> None:
    """Drops whatever names a file of weights."""
    if isinstance(node, (list, tuple)):
        for child in node:
            _forget_weights(child)
    if not isinstance(node, dict):
        return
    if isinstance(node.get('init_cfg'), dict) and node['init_cfg'].get('type') == 'Pretrained':
        node['init_cfg'] = None
    if isinstance(node.get('pretrained'), str):
        node['pretrained'] = None
    for key, child in list(node.items()):
        if key not in ('init_cfg', 'train_dataloader', 'val_dataloader', 'test_dataloader'):
            _forget_weights(child)


def _pad_less(preprocessor: dict, size: int) -> None:
    """Batches are padded, or resized, to the small images' size instead of the usual ones'."""
    for part in (preprocessor, *(preprocessor.get('batch_augments') or ())):
        for key in ('size', 'random_size_range'):
            if part.get(key):
                part[key] = (size, size)


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
    load = dict(type='LoadAnnotations', with_bbox=True, with_mask=bool(load.get('with_mask') or 'Panoptic' in kinds))
    return dict(
        type='CocoDataset',
        data_root=str(folder),
        ann_file='train.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=[str(i) for i in range(classes)]),
        pipeline=[dict(type='LoadImageFromFile'), load, dict(type='PackDetInputs')],
    )


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('toolkit', choices=list(METHODS))
    parser.add_argument('families', nargs='*', help='some families only (default: all)')
    parser.add_argument('--write', metavar='PAGE', help='Markdown page whose section named as the toolkit is replaced')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/survey'), help='where the outcomes are kept')
    parser.add_argument('--again', action='store_true', help='also families whose outcomes are there already')
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / f'{args.toolkit}.json'
    rows = json.loads(record.read_text()) if record.exists() else {}
    for family in families(args.toolkit, args.families):
        if family in rows and not args.again:
            continue
        rows.update(survey(args.toolkit, [family]))
        with replacing(record) as beside:
            beside.write_text(json.dumps(dict(sorted(rows.items())), indent=1))

    rows = dict(sorted(rows.items()))
    cells = [row[method] for row in rows.values() for method in METHODS[args.toolkit]]
    package = {'mmseg': 'mmsegmentation'}.get(args.toolkit, args.toolkit)
    text = (
        f'{datetime.date.today()}, {args.toolkit} {importlib.metadata.version(package)}, torch {torch.__version__}, '
        f'Python {platform.python_version()}. '
        f'{len(rows)} families, {len(cells)} trainings: '
        + ', '.join(f'{sum(c.startswith(kind) for c in cells)} {kind}' for kind in ('trains', 'refused', 'toolkit'))
        + f', {sum(c.startswith("DEFECT") for c in cells) or "no"} defect.\n\n'
        + table(rows)
    )
    print(text)
    if args.write:
        write_section(args.write, args.toolkit, text)


if __name__ == '__main__':
    main()
