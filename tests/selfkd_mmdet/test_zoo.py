"""Every RoI head of MMDetection's own configs: known, or refused by name, and never exchanged for another one."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.utils import get_installed_path

from selfkd_mmdet import CSKDHook, FRSKDRoIHead
from selfkd_mmdet.regions import check_past_of_regions


@pytest.fixture(scope='module')
def roi_heads():
    """The different RoI heads of the zoo, as a detector builds them: ``(file name, options)``."""
    found, folder = {}, Path(get_installed_path('mmdet'), '.mim/configs')
    for path in sorted([*folder.glob('*/*.py'), *folder.glob('_base_/models/*.py')]):
        if not re.search('roi_head|rcnn=', path.read_text()):  # it has the RoI head of its base, which is read, too
            continue
        try:
            model = Config.fromfile(path).get('model', {})
        except FileNotFoundError:
            continue  # a few trackers' configs inherit from files that MMDetection does not ship
        model = model.get('detector', model)
        if 'roi_head' in model:
            parts = {f'{name}_cfg': (model.get(f'{name}_cfg') or {}).get('rcnn') for name in ('train', 'test')}
            options = {**model.roi_head, **parts}
            found.setdefault(json.dumps(options, sort_keys=True, default=str), (path.name, options))
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)  # MMSyncBN cannot be built without
    yield list(found.values())
    dist.destroy_process_group()


def build(options):
    with torch.device('meta'):  # shapes only
        return MODELS.build(options)


def refusal(options):
    """Of heads of the right type: what they have that a self-teacher can do nothing with."""
    for head in ('SABLHead', 'SeesawLoss', 'CrossEntropyCustomLoss'):
        if f"'{head}'" in str(options):
            return f'(type=|classifies regions with ){head}'
    extractors = options['bbox_roi_extractor']
    levels = (extractors if isinstance(extractors, dict) else extractors[0])['featmap_strides']
    return 'regions are read from 1 level' if len(levels) == 1 else None


def test_frskd_takes_the_place_of_no_other_head(roi_heads):
    replaced, refused = set(), set()
    for name, options in roi_heads:
        kind, options = options['type'], {**options, 'type': 'selfkd_mmdet.FRSKDRoIHead'}
        known = kind in ('StandardRoIHead', 'CascadeRoIHead')
        reason = refusal(options) if known else kind
        if reason is None:
            head = build(options)
            assert isinstance(head, FRSKDRoIHead), name
            assert isinstance(head, MODELS.get(kind)), name
            replaced.add(kind)
        else:
            with pytest.raises(ValueError, match=f'FRSKDRoIHead: .*{reason}'):
                build(options)
            refused.add(reason)
    assert replaced == {'StandardRoIHead', 'CascadeRoIHead'}
    assert len(refused) == 11 + 4  # kinds of RoI heads, and reasons against others


def test_pskd_takes_all_but_crowddets_and_cskd_those_with_a_softmax(roi_heads):
    kinds = set()
    for _, options in roi_heads:
        model, kind = SimpleNamespace(roi_head=build(options)), options['type']
        kinds.add(kind)
        if kind == 'MultiInstanceRoIHead':
            with pytest.raises(ValueError, match='MultiInstanceRoIHead classifies each region 2 times'):
                check_past_of_regions('PSKDHook', model)
        else:
            check_past_of_regions('PSKDHook', model)
        others = {'MultiInstanceRoIHead': 'each region 2 times', 'TridentRoIHead': 'reads each image 3 times'}
        losses = ('SeesawLoss', 'CrossEntropyCustomLoss', 'FocalLoss')
        sigmoid = next((loss for loss in losses if loss in str(options['bbox_head'])), None)
        reason = others.get(kind) or (sigmoid and f'classifies regions with {sigmoid}')
        if reason is None:
            CSKDHook().check(None, model)
            continue
        with pytest.raises(ValueError, match=f'CSKDHook: .*{reason}'):
            CSKDHook().check(None, model)
    assert len(kinds) == 13
