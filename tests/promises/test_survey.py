"""A part of the survey of the toolkits' own zoos (tools/survey.py), which docs/support.md has whole."""

import json
from pathlib import Path

import pytest
from helpers import ROOT

FAMILIES = {  # family -> what is to come of each method, in the order of the survey
    'mmpretrain': {
        'resnet': 'ttt',
        'swin_transformer': 'ttt',
        'deit': 'ttr',
        'arcface': 'rrr',
        'simclr': 'rrr',
    },
    'mmdet': {
        'faster_rcnn': 'ttt',
        'retinanet': 'trr',
        'rtmdet': 'trr',
        'maskformer': 'rrr',
    },
    'mmseg': {
        'fcn': 'tt',
        'segformer': 'tt',
        'upernet': 'tt',
        'segmenter': 'tr',
        'pidnet': 'tr',
        'knet': 'rr',
        'mask2former': 'rr',
    },
}


@pytest.mark.parametrize(
    ('toolkit', 'family'), [(toolkit, family) for toolkit in FAMILIES for family in FAMILIES[toolkit]]
)
def test_part_of_the_zoo(toolkit, family):
    pytest.importorskip(toolkit)
    survey = pytest.importorskip('survey')
    found = survey.survey(toolkit, [family])[family]
    outcomes = [found[method] for method in survey.METHODS[toolkit]]
    assert ''.join(outcome[0] for outcome in outcomes) == FAMILIES[toolkit][family], json.dumps(found, indent=1)


@pytest.mark.parametrize('family', ['htc', 'panoptic_fpn', 'fast_rcnn', 'pvt', 'lad', 'ld'])
def test_a_family_gets_what_it_trains_on(family, tmp_path):
    """Semantic maps, proposals; and no weights, nor files of the toolkit's own repository."""
    mmdet = pytest.importorskip('mmdet')
    survey = pytest.importorskip('survey')
    from mmdet.registry import DATASETS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    zoo = Path(mmdet.__file__).parent / '.mim/configs'
    config = survey.families('mmdet', [family])[family]
    cfg = survey.shrink(Config.fromfile(zoo / config, format_python_code=False), 'mmdet', str(tmp_path))
    sample = DATASETS.build(cfg.train_dataloader.dataset)[0]['data_samples']
    assert ('gt_sem_seg' in sample) == (family in ('htc', 'panoptic_fpn'))
    assert ('proposals' in sample) == (family == 'fast_rcnn')
    assert 'https://' not in str(cfg.model)
    assert Path(cfg.model.get('teacher_config', zoo)).exists()


def test_the_page_is_the_surveys():
    """Every family of the page is one of the zoo, and nothing on it is a defect."""
    page = (ROOT / 'docs/support.md').read_text()
    assert 'DEFECT' not in page
