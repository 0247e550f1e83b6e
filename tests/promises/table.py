"""Every method in every toolkit, and how it is switched on: what the promises are tested over.

A method added here has every promise tested; a promise added in test_promises.py covers every method.
"""

import importlib.util
from typing import Callable, Dict, NamedTuple, Optional, Tuple

import pytest


class Toolkit(NamedTuple):
    """A toolkit.

    Attributes:
        name: as it is imported.
        driver: gives what drives it in a test.
        loops: kinds of training loop that it has.
        accumulates: whether it accumulates gradients over batches.
        casts: whether it trains in mixed precision on a CPU.
        validates: whether its driver computes a validation loss (``validation_losses``).
        passes: whether it is the user's code that calls the network.
    """

    name: str
    driver: Callable
    loops: Tuple[str, ...] = ('epoch', 'iteration')
    accumulates: bool = True
    casts: bool = True
    validates: bool = True
    passes: bool = False


class Row(NamedTuple):
    """A method in a toolkit.

    Attributes:
        method: its name.
        toolkit: where.
        hooks: hooks of the config that are the method.
        options: other settings that switch it on.
        zero: settings with which it weighs nothing; None where training has more to learn than the plain model (more
            weights, or more views of an image).
        model: options of the toy model and its data, with the method and without.
        batch_sampler: what an iteration-based loop's config must ask for, where batches are pairs.
        acts_at_once: whether the first step's loss already differs from the plain one.
        knows_samples: whether it keeps or pairs predictions by sample, so that samples which are moved between the
            sampler and the loss must be noticed (``shuffle_within_batches``).
        validates: whether the plain model computes a loss in evaluation mode.
    """

    method: str
    toolkit: Toolkit
    hooks: Tuple[dict, ...] = ()
    options: Dict[str, object] = {}
    zero: Optional[dict] = None
    model: Dict[str, object] = {}
    batch_sampler: Optional[str] = None
    acts_at_once: bool = True
    knows_samples: bool = False
    validates: bool = True

    def __str__(self) -> str:
        return f'{self.toolkit.name}-{self.method}'


def _openmmlab(row, request, folder):
    from openmmlab import Driver

    return Driver(row, request, folder)


def _fairseq(row, request, folder):
    from translation import Driver

    return Driver(row, request, folder)


def _detectron2(row, request, folder):
    from detectron import Driver

    return Driver(row, request, folder)


def _torch(row, request, folder):
    from loops import Driver

    return Driver(row, request, folder)


def _lightning(row, request, folder):
    from loops import LightningDriver

    return LightningDriver(row, request, folder)


def _transformers(row, request, folder):
    from loops import TransformersDriver

    return TransformersDriver(row, request, folder)


FAIRSEQ = Toolkit('fairseq', _fairseq, casts=False, validates=False)
DETECTRON2 = Toolkit('detectron2', _detectron2, ('iteration',), accumulates=False, casts=False)
MMPRETRAIN, MMDET, MMSEG = (Toolkit(name, _openmmlab) for name in ('mmpretrain', 'mmdet', 'mmseg'))
TORCH = Toolkit('torch', _torch, ('epoch',), passes=True)
LIGHTNING = Toolkit('lightning', _lightning, ('epoch',), passes=True)  # with max_steps its own resuming is not exact
TRANSFORMERS = Toolkit('transformers', _transformers, passes=True)
PAST = dict(zero=dict(alpha=0.0), acts_at_once=False)
BANK = dict(knows_samples=True, **PAST)
PSKD_IN_FAIRSEQ = '--criterion pskd_label_smoothed_cross_entropy --pskd-teacher'
AVERAGE = '--store-ema --ema-decay 0.9'
TWO_VIEWS = ('LoadImageFromFile', 'FlipEverySecondTime', 'PackInputs')  # helpers/mmengine.py

ROWS = [
    Row('PSKD-bank', MMPRETRAIN, (dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8),), **BANK),
    Row('PSKD-bank-top_k', MMPRETRAIN, (dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8, top_k=3),), **BANK),
    Row(
        'PSKD-bank-momentum',
        MMPRETRAIN,
        (dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8, bank_momentum=0.5),),
        **BANK,
    ),
    Row('PSKD-snapshot', MMPRETRAIN, (dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8, teacher='snapshot'),), **PAST),
    Row('PSKD-ema', MMPRETRAIN, (dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8, teacher='ema'),), **PAST),
    Row(
        'CSKD',
        MMPRETRAIN,
        (dict(type='selfkd_mmpretrain.CSKDHook'),),
        zero=dict(weight=0.0),
        batch_sampler='selfkd_mmengine.PairBatchSampler',
        knows_samples=True,
    ),
    Row('FRSKD', MMPRETRAIN, options={'model.type': 'selfkd_mmpretrain.FRSKDImageClassifier'}),
    Row('TFKD', MMPRETRAIN, (dict(type='selfkd_mmpretrain.TFKDHook'),), zero=dict(alpha=0.0)),
    Row(
        'BYOT',
        MMPRETRAIN,
        options={
            'model.backbone.out_indices': (0, 1, 2, 3),
            'model.neck': None,
            'model.head.type': 'selfkd_mmpretrain.BYOTClsHead',
            'model.head.in_channels': [4, 8, 16, 32],
        },
    ),
    Row(
        'DDGSD',
        MMPRETRAIN,
        (dict(type='selfkd_mmpretrain.DDGSDHook'),),
        model={'train_dataloader.dataset.pipeline': [dict(type=name) for name in TWO_VIEWS]},
        batch_sampler='selfkd_mmengine.ViewBatchSampler',
        knows_samples=True,
    ),
    Row('PSKD', MMDET, (dict(type='selfkd_mmdet.PSKDHook', alpha=0.8),), **PAST),
    Row('PSKD-ema', MMDET, (dict(type='selfkd_mmdet.PSKDHook', alpha=0.8, teacher='ema'),), **PAST),
    Row(
        'PSKD-RetinaNet', MMDET, (dict(type='selfkd_mmdet.PSKDHook', alpha=0.8),), model={'model': 'retinanet'}, **PAST
    ),
    *(
        Row(
            f'PSKD-{model}',
            MMDET,
            (dict(type='selfkd_mmdet.PSKDHook', alpha=0.8),),
            model={'model': model},
            validates=model != 'deformable detr',  # whose encoder's outputs are there in training only
            **PAST,
        )
        for model in ('rtmdet', 'deformable detr')
    ),
    Row('CSKD', MMDET, (dict(type='selfkd_mmdet.CSKDHook'),), zero=dict(weight=0.0)),
    Row('FRSKD', MMDET, options={'model.roi_head.type': 'selfkd_mmdet.FRSKDRoIHead'}),
    Row('PSKD', MMSEG, (dict(type='selfkd_mmseg.PSKDHook', alpha=0.8),), **PAST),
    Row('PSKD-ema', MMSEG, (dict(type='selfkd_mmseg.PSKDHook', alpha=0.8, teacher='ema'),), **PAST),
    Row(
        'FRSKD',
        MMSEG,
        options={'model.type': 'selfkd_mmseg.FRSKDEncoderDecoder', 'model.self_teacher.warmup': 0.0},
    ),
    *(
        Row(
            f'PSKD-{teacher}',
            FAIRSEQ,
            options=dict(args=f'{PSKD_IN_FAIRSEQ} {teacher} --pskd-alpha 0.8'),
            zero=dict(args=f'{PSKD_IN_FAIRSEQ} {teacher} --pskd-alpha 0'),
            acts_at_once=False,
            knows_samples=teacher == 'bank',
        )
        for teacher in ('snapshot', 'bank')
    ),
    Row(
        'PSKD-ema',
        FAIRSEQ,
        options=dict(args=f'{PSKD_IN_FAIRSEQ} ema {AVERAGE} --pskd-alpha 0.8'),
        zero=dict(args=f'{PSKD_IN_FAIRSEQ} ema {AVERAGE} --pskd-alpha 0'),
    ),
    Row(
        'CSKD',
        FAIRSEQ,
        options=dict(args='--criterion cskd_label_smoothed_cross_entropy --cskd-weight 1'),
        zero=dict(args='--criterion cskd_label_smoothed_cross_entropy --cskd-weight 0'),
    ),
    *(
        Row(
            f'PSKD-{teacher}',
            DETECTRON2,
            options=dict(args=f'SELFKD.PSKD.ENABLED True SELFKD.PSKD.INTERVAL 3 SELFKD.PSKD.TEACHER {teacher}'),
            zero=dict(args='SELFKD.PSKD.ENABLED True SELFKD.PSKD.INTERVAL 3 SELFKD.PSKD.ALPHA 0'),
            acts_at_once=False,
        )
        for teacher in ('snapshot', 'ema')
    ),
    Row(
        'CSKD',
        DETECTRON2,
        options=dict(args='SELFKD.CSKD.ENABLED True'),
        zero=dict(args='SELFKD.CSKD.ENABLED True SELFKD.CSKD.WEIGHT 0'),
    ),
    Row('FRSKD', DETECTRON2, options=dict(args='SELFKD.FRSKD.ENABLED True')),
    Row('PSKD-bank', TORCH, options=dict(alpha=0.8), **BANK),
    Row('PSKD-snapshot', TORCH, options=dict(alpha=0.8, teacher='snapshot'), **PAST),
    Row('PSKD-ema', TORCH, options=dict(alpha=0.8, teacher='ema', ema_decay=0.9, keep_hard=True), **PAST),
    Row('PSKD-bank-momentum', TORCH, options=dict(alpha=0.8, bank_momentum=0.5), **BANK),
    Row('TokenPSKD', TORCH, options=dict(alpha=0.8), **BANK),
    Row('CSKD', TORCH, zero=dict(weight=0.0), knows_samples=True),
    Row('FRSKD', TORCH),
    Row('PSKD-bank', LIGHTNING, options=dict(alpha=0.8), **BANK),
    Row('PSKD-snapshot', LIGHTNING, options=dict(alpha=0.8, teacher='snapshot'), **PAST),
    Row('PSKD-ema', LIGHTNING, options=dict(alpha=0.8, teacher='ema', ema_decay=0.9), **PAST),
    Row('CSKD', LIGHTNING, zero=dict(weight=0.0), knows_samples=True),
    Row('FRSKD', LIGHTNING),
    *(
        Row(
            f'PSKD-{teacher}',
            TRANSFORMERS,
            options=dict(pskd_alpha=0.8, pskd_teacher=teacher),
            zero=dict(pskd_alpha=0.0),
            acts_at_once=False,
            knows_samples=teacher == 'bank',
        )
        for teacher in ('bank', 'snapshot', 'ema')
    ),
    Row('CSKD', TRANSFORMERS, zero=dict(cskd_weight=0.0), knows_samples=True),
    Row('FRSKD', TRANSFORMERS),
]


def rows(*, where: Callable = lambda row: True, loops: bool = False):
    """The rows as parameters of a test (with the loops of their toolkits, if asked for); those of a toolkit that is not
    installed are skipped with that reason."""
    chosen = [row for row in ROWS if where(row)]
    if not loops:
        return pytest.mark.parametrize('row', [pytest.param(row, id=str(row), marks=_marks(row)) for row in chosen])
    pairs = [(row, loop) for row in chosen for loop in row.toolkit.loops]
    parameters = [pytest.param(row, loop, id=f'{row}-{loop}', marks=_marks(row)) for row, loop in pairs]
    return pytest.mark.parametrize(('row', 'loop'), parameters)


def _marks(row: Row):
    there = importlib.util.find_spec(row.toolkit.name) is not None
    return () if there else pytest.mark.skip(reason=f'{row.toolkit.name} is not installed')
