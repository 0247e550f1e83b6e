"""tools/train_detectron2.py from its command line: a YAML config, and a LazyConfig."""

import subprocess
import sys

import d2_runs  # first: it skips where there is no Detectron2
import make_toy_data
import pytest
import train_detectron2
from detectron2.engine import default_argument_parser


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    folder = tmp_path_factory.mktemp('VOCdevkit')
    make_toy_data.voc(folder, train_size=4, test_size=2)
    return folder


def run(*arguments):
    train_detectron2.main(default_argument_parser().parse_args(list(arguments)))


@pytest.mark.parametrize('method', ['pskd', 'cskd'])
def test_yaml_config_trains_evaluates_and_resumes(voc, tmp_path, method):
    config = d2_runs.CONFIG.with_name(f'{d2_runs.CONFIG.stem}_{method}.yaml')
    options = [*d2_runs.TINY.split(), 'VOC.ROOT', str(voc / 'VOC2007'), 'OUTPUT_DIR', str(tmp_path)]
    options[options.index('DATASETS.TEST') + 1] = '("custom_voc_test",)'
    run('--config-file', str(config), *options, 'SOLVER.CHECKPOINT_PERIOD', '3')
    logs = d2_runs.scalars(tmp_path)
    assert 'bbox/AP50' in logs[6]
    if method == 'pskd':
        assert logs[5]['pskd_alpha'] == pytest.approx(0.8 * 4 / 6)  # 4 images in batches of 2: 2 iterations a pass
        assert logs[5]['pskd_soft'] > 0
    else:
        assert logs[5]['loss_cskd'] >= 0
    (tmp_path / 'last_checkpoint').write_text('model_0000002.pth')
    (tmp_path / 'metrics.json').unlink()
    run('--config-file', str(config), '--resume', *options)
    assert max(d2_runs.scalars(tmp_path)) == 6
    (tmp_path / 'metrics.json').unlink()
    run('--config-file', str(config), '--eval-only', *options, 'MODEL.WEIGHTS', str(tmp_path / 'model_final.pth'))
    assert not (tmp_path / 'metrics.json').exists()  # nothing was trained


LAZY = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

import d2_runs
from selfkd_detectron2 import PSKDHook

model = model_zoo.get_config('common/models/fcos.py').model
model.num_classes = 10
model.head.conv_dims, model.head.norm = [16], ''
model.head.input_shape = [ShapeSpec(channels=16)] * 5
model.backbone.out_channels = model.backbone.top_block.in_channels = 16
model.backbone.bottom_up.stages.depth = 18
model.backbone.bottom_up.stages.pop('stride_in_1x1')
optimizer = model_zoo.get_config('common/optim.py').SGD
optimizer.lr = 1e-4
lr_multiplier = model_zoo.get_config('common/coco_schedule.py').lr_multiplier_1x
train = model_zoo.get_config('common/train.py').train
train.update(max_iter=5, device='cpu', init_checkpoint='', output_dir='', log_period=1)
dataloader = dict(train=L(d2_runs.lazy_loader)(voc=''))
train.selfkd = [L(PSKDHook)(alpha=0.8, interval=2)]
"""


def test_lazy_config_trains(voc, tmp_path):
    (tmp_path / 'fcos.py').write_text(LAZY)
    run('--config-file', str(tmp_path / 'fcos.py'), f'train.output_dir={tmp_path}', f'dataloader.train.voc={voc}')
    assert d2_runs.scalars(tmp_path)[4]['pskd_alpha'] == pytest.approx(0.8 * 4 / 5)
    assert 'pskd_soft' in d2_runs.scalars(tmp_path)[4]


def test_plugin_imports_no_other_toolkit():
    """Detectron2 itself is imported first: only what the plugin adds counts."""
    code = 'import sys, detectron2.engine; before = set(sys.modules); import selfkd_detectron2; '
    code += 'print(sorted({m.split(".")[0] for m in set(sys.modules) - before} & {"mmengine", "mmdet", "fairseq"}))'
    outcome = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert outcome.stdout.strip() == '[]'
