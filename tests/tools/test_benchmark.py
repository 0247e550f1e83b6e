"""tools/benchmark.py: every suite, in small numbers, and the sizes that it has for a GPU."""

import math
import os
import subprocess
import sys
import types
from importlib import import_module

import pytest
import torch
from costs import Table, compare, held_bytes, peak_bytes, to_markdown, write_section
from helpers import ROOT
from mmengine.registry import MODELS, DefaultScope

TOOL = ROOT / 'tools/benchmark.py'
PAGE = ROOT / 'docs/performance.md'


def test_benchmark_ratios_and_sections(tmp_path, monkeypatch):
    """By a clock that the steps move; the real one tells what else the machine does."""
    clock, steps = [0.0], []

    def step(name, seconds):
        def work():
            clock[0] += seconds * len(steps)  # ever slower, as on a machine that gets busy
            steps.append(name)
            torch.zeros(1000 * seconds)

        return work

    monkeypatch.setattr('costs.time', types.SimpleNamespace(perf_counter=lambda: clock[0]))
    one, four = compare({'one': step('one', 1), 'four': step('four', 4)}, repeats=5, burst=1)
    assert steps == ['one', 'four'] * 8 + ['one', 'four']  # in turn: 3 to warm up, 5 timed, one for the memory
    assert (one.time_ratio, one.memory_ratio, four.memory_ratio) == (1, 1, 4)
    assert one.milliseconds == 1000 * 10  # the median: the third that is timed
    assert four.time_ratio == 4 * 11 / 10  # the median over the pairs
    assert four.milliseconds == one.milliseconds * four.time_ratio  # its own median would contradict the ratio
    table = to_markdown(Table('title', [one], tokens=500))
    assert table.splitlines()[-1] == '| one | 1e+04 | 1.00 | 1.00 | 50 |'
    del steps[:]
    compare({'one': step('one', 1)}, repeats=1, burst=3)
    assert steps == ['one'] * 3
    assert peak_bytes(lambda: torch.zeros(1000) + torch.zeros(1000)) == 3 * 4000
    assert held_bytes(lambda: torch.zeros(1000, device='meta').view(10, 100) + 1) == 2 * 4000
    page = tmp_path / 'page.md'
    page.write_text('a\n<!-- loss -->\nold\n<!-- end loss -->\nb\n')
    write_section(str(page), 'loss', 'new')
    assert page.read_text() == 'a\n<!-- loss -->\nnew\n<!-- end loss -->\nb\n'
    with pytest.raises(ValueError, match='has no section'):
        write_section(str(page), 'other', 'x')


@pytest.fixture
def toolkit(monkeypatch):
    """Imports a toolkit's suites; skips where it is not installed."""

    def load(name):
        pytest.importorskip({'losses': 'torch', 'torch': 'torchvision'}.get(name, name))
        if name == 'mmpretrain':  # mmengine has mixed precision for GPUs alone; torch has bfloat16 for CPUs
            monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
        return import_module(f'suites.{name}')

    return load


# Rows of each table, the plain one first.
ROWS = {
    'loss': [5, 3],
    'bank': [3 + 2 * torch.cuda.is_available()],
    'torch': [4],
    'mmpretrain': [4, 4],
    'distillation': [3, 3],
    'mmdet': [4, 2, 2, 2],
    'detectron2': [4],
    'mmseg': [3, 5],
    'fairseq': [3],
}


def suites():
    import benchmark

    return {name: where.split(':') for name, where in benchmark.SUITES.items()}


@pytest.mark.parametrize('name', ROWS)
def test_each_suite_measures_what_the_full_size_does(name, toolkit):
    module, function = suites()[name]
    tables = getattr(toolkit(module.split('.')[1]), function)('tiny')
    assert [len(table.costs) for table in tables] == ROWS[name]
    for table in tables:
        assert table.title.endswith('.')
        for cost in table.costs:
            assert 0 < cost.milliseconds < math.inf, cost
            assert 0 < cost.time_ratio < math.inf, cost
            assert 0 < cost.memory_ratio < math.inf, cost
        assert table.costs[0].time_ratio == table.costs[0].memory_ratio == 1


COUNTED = {'memory': 7, 'kernels': 8, 'syncs': 8}  # rows


@pytest.mark.parametrize('name', COUNTED)
def test_what_is_counted_meets_the_targets(name, toolkit):
    toolkit('torch')
    module, function = suites()[name]
    (table,) = getattr(import_module(module), function)()
    assert len(table.rows) == COUNTED[name]
    found = {row[0]: float(row[1]) for row in table.rows}
    if name == 'kernels':
        assert found['FRSKD'] < 500
    if name == 'syncs':
        assert not any(found.values())
    if name == 'memory':
        assert max(found[row[0]] / float(row[2]) for row in table.rows if row[2]) < 1.06
        assert found['pskd_loss, dense past'] < found['F.cross_entropy'] / 2
    assert to_markdown(table).count('\n') == len(table.rows) + 3


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def built(toolkit, cfg):
    """The model of an OpenMMLab toolkit's config."""
    with DefaultScope.overwrite_default_scope(toolkit):
        return MODELS.build(cfg.model)


def test_full_sizes_in_mmpretrain(toolkit):
    plugin = toolkit('mmpretrain')
    preact, resnet = plugin.SHAPES['full']
    assert (preact.batch, preact.pixels, preact.classes) == (128, 32, 100)
    assert (resnet.batch, resnet.pixels, resnet.classes) == (128, 224, 1000)
    assert parameters(built('mmpretrain', plugin.make_config(preact))) == 11_217_444
    cfg = plugin.make_config(resnet)
    assert parameters(built('mmpretrain', cfg)) == 25_557_032
    assert (cfg.optim_wrapper.type, cfg.train_dataloader.batch_size) == ('AmpOptimWrapper', 128)


def test_full_sizes_in_mmdet(toolkit):
    """Those of the zoo: batch 2 a GPU, the shorter side 800."""
    plugin = toolkit('mmdet')
    shape = plugin.SHAPES['full']
    assert (shape.batch, shape.height) == (2, 800)
    cfg = plugin.make_config(shape, 'pascal_voc/faster-rcnn_r50_fpn_1x_voc0712')
    assert cfg.model.train_cfg.rcnn.sampler.num == 512
    backbone = built('mmdet', cfg).backbone
    assert parameters(backbone) == 25_557_032 - 2049 * 1000  # ResNet-50 without its classifier


def test_full_sizes_in_mmseg(toolkit):
    plugin = toolkit('mmseg')
    shape = plugin.SHAPES['full'][0]
    assert (shape.batch, shape.pixels) == (4, 512)
    assert round(parameters(built('mmseg', plugin.make_config(shape))) / 1e6) == 49


def test_full_sizes_in_detectron2(toolkit):
    plugin = toolkit('detectron2')
    shape = plugin.SHAPES['full']
    assert min(shape.height, shape.width) == 800
    cfg = plugin.make_config(shape)
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.BACKBONE.NAME) == (50, 'build_resnet_fpn_backbone')


def test_full_sizes_in_fairseq(toolkit):
    """Vaswani et al.'s base model has 44.1 M parameters in its layers; two embeddings of 37000 words are not shared."""
    plugin = toolkit('fairseq')
    cfg, task = plugin.make_task([], '', plugin.SHAPES['full']._replace(sentences=2))
    assert (cfg.dataset.max_tokens, cfg.common.amp) == (8192, True)
    with torch.device('meta'):
        model = task.build_model(cfg.model)
    assert parameters(model) == 2 * 37000 * 512 + 44_138_496


def test_full_sizes_of_the_core(toolkit):
    plugin = toolkit('losses')
    assert plugin.LOSSES['full'][:3] == (8192, 128_000, torch.bfloat16)
    assert plugin.BANKS['full'][:2] == (1_281_167, 1000)
    network, batch, pixels, *_ = toolkit('torch').SHAPES['full']
    assert (network, batch, pixels) == ('resnet50', 128, 224)


@pytest.mark.parametrize('name', [*COUNTED, *ROWS, *(f'{name}-full' for name in ROWS)])
def test_the_page_has_a_section_for_each_suite(name, tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(PAGE.read_text())
    write_section(str(page), name, 'measured')


@pytest.mark.parametrize('option', [['--device', 'cuda'], ['--size', 'full']])
def test_without_a_gpu_what_needs_one_is_refused(option):
    outcome = subprocess.run(
        [sys.executable, TOOL, 'loss', *option],
        capture_output=True,
        text=True,
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
    )
    assert outcome.returncode == 2
    assert ' '.join(option) in outcome.stderr
    assert 'needs a GPU' in outcome.stderr
