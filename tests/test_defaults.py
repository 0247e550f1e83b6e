"""selfkd.defaults against every constructor, config node, flag and dataclass: names, order and defaults.

An option that a plugin forgets, or has under another name, fails here. What a plugin does not have is said by name.
"""

import dataclasses
import importlib
import inspect
from typing import Any, Callable, Dict, NamedTuple, Sequence

import pytest

from selfkd import defaults

BANK = ('top_k', 'bank_dtype', 'bank_device', 'bank_momentum')


def constructor(path: str, positional: int = 1) -> Callable[[], Dict[str, Any]]:
    """Options of a class, ``'module:Class'``; all but the first few by name only."""

    def options() -> Dict[str, Any]:
        module, name = path.split(':')
        parameters = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters.values())
        assert sum(p.kind is not p.KEYWORD_ONLY for p in parameters) <= positional
        return {p.name: p.default for p in parameters}

    return options


def fields(path: str, prefix: str) -> Callable[[], Dict[str, Any]]:
    def options() -> Dict[str, Any]:
        module, name = path.split(':')
        found = dataclasses.fields(getattr(importlib.import_module(module), name))
        return {field.name[len(prefix) :]: field.default for field in found if field.name.startswith(prefix)}

    return options


def node(method: str) -> Callable[[], Dict[str, Any]]:
    """A node of Detectron2's config; None stands for the hook's default."""

    def options() -> Dict[str, Any]:
        from detectron2.config import CfgNode

        from selfkd_detectron2 import add_selfkd_config

        cfg = CfgNode()
        add_selfkd_config(cfg)
        return {name.lower(): value for name, value in cfg.SELFKD[method].items() if name != 'ENABLED'}

    return options


class Place(NamedTuple):
    """Where a method's options are given.

    Attributes:
        toolkit: that must be installed.
        options: their defaults, in order.
        method: its table in selfkd.defaults.
        task: whose defaults they are.
        absent: options that make no sense there.
        by_task: options whose default, None, is found when it is known what is trained.
    """

    toolkit: str
    options: Callable[[], Dict[str, Any]]
    method: str
    task: str
    absent: Sequence[str] = ()
    by_task: Sequence[str] = ()


PLACES = {
    'mmpretrain PSKD': Place(
        'mmpretrain', constructor('selfkd_mmpretrain:PSKDHook'), 'PSKD', 'classification', ['background']
    ),
    'mmdet PSKD': Place('mmdet', constructor('selfkd_mmdet:PSKDHook'), 'PSKD', 'detection', BANK),
    'mmseg PSKD': Place('mmseg', constructor('selfkd_mmseg:PSKDHook'), 'PSKD', 'segmentation', ('background', *BANK)),
    'detectron2 PSKD': Place('detectron2', constructor('selfkd_detectron2:PSKDHook'), 'PSKD', 'detection', BANK),
    'detectron2 SELFKD.PSKD': Place('detectron2', node('PSKD'), 'PSKD', 'detection', BANK, ('alpha', 'ema_decay')),
    'fairseq PSKD': Place(
        'fairseq',
        fields('selfkd_fairseq.criterions:PSKDConfig', 'pskd_'),
        'PSKD',
        'translation',
        ('ema_decay', 'background', 'bank_device', 'bank_momentum'),  # fairseq has --ema-decay
    ),
    'torch PSKD': Place(
        'torch', constructor('selfkd_torch:PSKD', positional=2), 'PSKD', 'classification', ['background']
    ),
    'lightning PSKD': Place(
        'lightning', constructor('selfkd_lightning:PSKD'), 'PSKD', 'classification', ['background']
    ),
    'transformers PSKD': Place(
        'transformers',
        fields('selfkd_transformers:PSKDArguments', 'pskd_'),
        'PSKD',
        'classification',
        ['background'],
        ('bank_dtype',),
    ),
    'mmpretrain CSKD': Place('mmpretrain', constructor('selfkd_mmpretrain:CSKDHook'), 'CSKD', 'classification'),
    'mmdet CSKD': Place('mmdet', constructor('selfkd_mmdet:CSKDHook'), 'CSKD', 'detection'),
    'detectron2 CSKD': Place('detectron2', constructor('selfkd_detectron2:CSKDHook'), 'CSKD', 'detection'),
    'detectron2 SELFKD.CSKD': Place('detectron2', node('CSKD'), 'CSKD', 'detection', (), ('weight', 'temperature')),
    'fairseq CSKD': Place(
        'fairseq',
        fields('selfkd_fairseq.cskd:CSKDLabelSmoothedCrossEntropyCriterionConfig', 'cskd_'),
        'CSKD',
        'translation',
    ),
    'torch CSKD': Place('torch', constructor('selfkd_torch:CSKD', positional=2), 'CSKD', 'classification'),
    'lightning CSKD': Place('lightning', constructor('selfkd_lightning:CSKD'), 'CSKD', 'classification'),
    'lightning FRSKD': Place('lightning', constructor('selfkd_lightning:FRSKD'), 'FRSKD', 'classification'),
    'mmpretrain FRSKD': Place(
        'mmpretrain', constructor('selfkd_mmpretrain.frskd:SelfTeacher', positional=20), 'FRSKD', 'classification'
    ),
    'mmseg FRSKD': Place(
        'mmseg', constructor('selfkd_mmseg.frskd:SelfTeacher', positional=20), 'FRSKD', 'segmentation'
    ),
    'transformers CSKD': Place(
        'transformers', fields('selfkd_transformers:CSKDArguments', 'cskd_'), 'CSKD', 'classification'
    ),
    'transformers FRSKD': Place(
        'transformers', fields('selfkd_transformers:FRSKDArguments', 'frskd_'), 'FRSKD', 'classification'
    ),
    'torch FRSKD': Place('torch', constructor('selfkd_torch:FRSKD', positional=3), 'FRSKD', 'classification'),
    'detectron2 SELFKD.FRSKD': Place(
        'detectron2', node('FRSKD'), 'FRSKD', 'detection', (), ('alpha', 'beta', 'temperature')
    ),
}


@pytest.mark.parametrize('name', PLACES)
def test_options_are_those_of_the_one_vocabulary(name):
    place = PLACES[name]
    pytest.importorskip(place.toolkit, reason=f'{place.toolkit} is not installed')
    table = getattr(defaults, place.method)
    expected = {option: _of_task(value, place.task) for option, value in table.items() if option not in place.absent}
    expected.update(dict.fromkeys(place.by_task))
    found = place.options()
    assert {option: found[option] for option in found if option in table} == expected
    assert [option for option in found if option in table] == list(expected)  # in this order


def _of_task(value: Any, task: str) -> Any:
    return value.get(task) if isinstance(value, dict) else value
