"""A part of the survey of the toolkits' own zoos (tools/survey.py), which docs/support.md has whole."""

import json

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
        'cascade_rcnn': 'ttt',
        'retinanet': 'trr',
        'detr': 'trr',
        'yolox': 'trr',
        'rtmdet': 'trr',
        'solo': 'rrr',
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


@pytest.mark.parametrize('toolkit', list(FAMILIES))
def test_part_of_the_zoo(toolkit):
    pytest.importorskip(toolkit)
    survey = pytest.importorskip('survey')
    found = survey.survey(toolkit, list(FAMILIES[toolkit]))
    outcomes = {family: [row[method] for method in survey.METHODS[toolkit]] for family, row in found.items()}
    short = {family: ''.join(outcome[0] for outcome in row) for family, row in outcomes.items()}
    assert short == FAMILIES[toolkit], json.dumps(found, indent=1)


def test_the_page_is_the_surveys():
    """Every family of the page is one of the zoo, and nothing on it is a defect."""
    page = (ROOT / 'docs/support.md').read_text()
    assert 'DEFECT' not in page
