"""``selfkd train-detectron2`` from its command line: a YAML config, and a LazyConfig."""

import json
import subprocess
import sys
from pathlib import Path

import helpers.detectron2 as d2_runs  # first: it skips where there is no Detectron2
import make_toy_data
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_lvis_instances
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.engine import default_argument_parser
from detectron2.evaluation import DatasetEvaluators

from selfkd.runs import logged_measures
from selfkd_detectron2 import train as script


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    folder = tmp_path_factory.mktemp('VOCdevkit')
    make_toy_data.voc(folder, train_size=4, test_size=2)
    return folder


def run(*arguments):
    script.main(arguments)


@pytest.mark.parametrize('method', ['pskd', 'cskd'])
def test_yaml_config_trains_evaluates_and_resumes(voc, tmp_path, method):
    config = d2_runs.CONFIG.with_name(f'{d2_runs.CONFIG.stem}_{method}.yaml')
    options = [*d2_runs.TINY.split(), 'VOC.ROOT', str(voc / 'VOC2007'), 'OUTPUT_DIR', str(tmp_path)]
    options[options.index('DATASETS.TEST') + 1] = '("custom_voc_test",)'
    run('--config-file', str(config), *options, 'SOLVER.CHECKPOINT_PERIOD', '3')
    logs = d2_runs.scalars(tmp_path)
    assert 'bbox/AP50' in logs[6]
    measured = {k: v for k, v in logs[6].items() if k.startswith(('bbox/', 'calibration/')) and v == v}
    assert 'calibration/detections' in measured
    assert logged_measures(str(tmp_path)) == {**measured, 'seed': 0}
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


def tiny(voc, out, *options):
    """The command line of a tiny run that is evaluated."""
    words = f'{d2_runs.TINY} VOC.ROOT {voc / "VOC2007"} OUTPUT_DIR {out} SOLVER.MAX_ITER 2 {" ".join(options)}'.split()
    return ['--config-file', str(d2_runs.CONFIG), *words]


def register_coco(voc, folder):
    """The digits as a data set of COCO's kind."""
    d2_runs.config(voc, folder)  # registers VOC's, from which it is made
    for split in ('trainval', 'test'):
        file = folder / f'{split}.json'
        if f'digits_{split}' in DatasetCatalog.list():
            DatasetCatalog.remove(f'digits_{split}')
            MetadataCatalog.remove(f'digits_{split}')
        convert_to_coco_json(f'custom_voc_{split}', str(file))
        register_coco_instances(f'digits_{split}', {}, str(file), str(voc / 'VOC2007/JPEGImages'))


def register_lvis(voc, folder):
    """The digits as a data set of LVIS's kind, under the first ten of its 1,203 classes."""
    d2_runs.config(voc, folder)
    for split in ('trainval', 'test'):
        samples = DatasetCatalog.get(f'custom_voc_{split}')
        images, annotations = [], []
        for sample in samples:
            number = int(sample['image_id'])
            images.append(
                dict(
                    id=number,
                    height=sample['height'],
                    width=sample['width'],
                    coco_url='http://host/JPEGImages/' + Path(sample['file_name']).name,
                    neg_category_ids=[],
                    not_exhaustive_category_ids=[],
                )
            )
            for x1, y1, x2, y2, label in ((*a['bbox'], a['category_id']) for a in sample['annotations']):
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=number,
                        category_id=label + 1,
                        bbox=[x1, y1, x2 - x1, y2 - y1],
                        area=(x2 - x1) * (y2 - y1),
                        segmentation=[[x1, y1, x2, y1, x2, y2, x1, y2]],
                    )
                )
        categories = [dict(id=i + 1, name=str(i), frequency='f', image_count=1, instance_count=1) for i in range(10)]
        file = folder / f'{split}.json'
        file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
        register_lvis_instances(f'lvis_v1_digits_{split}', {}, str(file), f'{voc / "VOC2007"}/')


@pytest.mark.parametrize(
    ('register', 'name', 'metric', 'classes'),
    [(register_coco, 'digits', 'bbox/APl', 10), (register_lvis, 'lvis_v1_digits', 'bbox/APf', 1203)],
)
def test_data_set_is_evaluated_as_its_kind_wants_it(voc, tmp_path, monkeypatch, register, name, metric, classes):
    if 'lvis' in name:
        pytest.importorskip('lvis')
        monkeypatch.setattr(np, 'float', float, raising=False)  # lvis 0.5.3 asks for it; NumPy 1.24 dropped it
    register(voc, tmp_path)
    sets = f'DATASETS.TRAIN ("{name}_trainval",) DATASETS.TEST ("{name}_test",) SELFKD.CSKD.ENABLED True'
    shown = f'MODEL.ROI_HEADS.NUM_CLASSES {classes} MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0'
    run(*tiny(voc, tmp_path, sets, shown))
    assert metric in d2_runs.scalars(tmp_path)[2]


@pytest.mark.parametrize(
    ('kind', 'evaluators'),
    [
        ('sem_seg', ['SemSegEvaluator']),
        ('coco_panoptic_seg', ['SemSegEvaluator', 'COCOEvaluator', 'COCOPanopticEvaluator']),
        ('cityscapes_instance', ['CityscapesInstanceEvaluator']),
        ('cityscapes_sem_seg', ['CityscapesSemSegEvaluator']),
    ],
)
def test_evaluators_of_other_kinds(voc, tmp_path, kind, evaluators):
    """Those of train_net.py; their data sets are too large for a test."""
    if 'cityscapes' in kind:
        pytest.importorskip('cityscapesscripts')
    register_coco(voc, tmp_path)
    labels = dict(stuff_classes=['a', 'b'], ignore_label=255, evaluator_type=kind, sem_seg_root='', panoptic_json='')
    ids = {'thing_dataset_id_to_contiguous_id': {}, 'stuff_dataset_id_to_contiguous_id': {}}
    name = f'{kind}_{tmp_path.name}'
    json_file = MetadataCatalog.get('digits_test').json_file
    DatasetCatalog.register(name, lambda: [])
    MetadataCatalog.get(name).set(**labels, **ids, json_file=json_file)
    made = script.Trainer.build_evaluator(d2_runs.config(voc, tmp_path), name)
    made = made._evaluators if isinstance(made, DatasetEvaluators) else [made]
    assert [type(evaluator).__name__ for evaluator in made] == evaluators


def test_data_set_of_no_known_kind_is_refused(voc, tmp_path):
    MetadataCatalog.get(f'none_{tmp_path.name}').evaluator_type = 'own'
    with pytest.raises(ValueError, match="of the type 'own', and there is an evaluator for coco, sem_seg"):
        script.Trainer.build_evaluator(d2_runs.config(voc, tmp_path), f'none_{tmp_path.name}')


def test_augmented_evaluation_and_expected_results(voc, tmp_path):
    register_coco(voc, tmp_path)
    sets = 'DATASETS.TEST ("digits_test",) TEST.AUG.ENABLED True TEST.AUG.MIN_SIZES (64,80) TEST.AUG.FLIP False'
    command = tiny(voc, tmp_path, sets)
    run(*command, 'TEST.EXPECTED_RESULTS', '[["bbox","AP50",0.0,100.0]]')
    assert (
        tmp_path / 'inference_TTA/coco_instances_results.json'
    ).exists()  # logged, as by train_net.py, on the screen
    weights = ['MODEL.WEIGHTS', str(tmp_path / 'model_final.pth')]
    results = script.train(default_argument_parser().parse_args(['--eval-only', *command, *weights]))
    assert set(results) == {'bbox', 'bbox_TTA'}
    with pytest.raises(SystemExit):  # as Detectron2's verify_results does
        run('--eval-only', *command, *weights, 'TEST.EXPECTED_RESULTS', '[["bbox","AP50",50.0,1.0]]')


LAZY = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

import helpers.detectron2 as d2_runs
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
dataloader = dict(train=L(d2_runs.lazy_loader)(voc='', dataset=dict(names='custom_voc_trainval')))
train.selfkd = [L(PSKDHook)(alpha=0.8, interval=2)]
"""


def test_lazy_config_trains(voc, tmp_path):
    (tmp_path / 'fcos.py').write_text(LAZY)
    run('--config-file', str(tmp_path / 'fcos.py'), f'train.output_dir={tmp_path}', f'dataloader.train.voc={voc}')
    assert d2_runs.scalars(tmp_path)[4]['pskd_alpha'] == pytest.approx(0.8 * 4 / 5)
    assert 'pskd_soft' in d2_runs.scalars(tmp_path)[4]


def test_lazy_config_with_another_number_of_classes_is_refused(voc, tmp_path):
    d2_runs.config(voc, tmp_path)
    (tmp_path / 'fcos.py').write_text(LAZY)
    options = [f'train.output_dir={tmp_path}', f'dataloader.train.voc={voc}', 'model.num_classes=20']
    with pytest.raises(ValueError, match='model.num_classes is 20, but .* custom_voc_trainval has 10 classes'):
        run('--config-file', str(tmp_path / 'fcos.py'), *options)


def test_plugin_imports_no_other_toolkit():
    """Detectron2 itself is imported first: only what the plugin adds counts."""
    code = 'import sys, detectron2.engine; before = set(sys.modules); import selfkd_detectron2; '
    code += 'print(sorted({m.split(".")[0] for m in set(sys.modules) - before} & {"mmengine", "mmdet", "fairseq"}))'
    outcome = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert outcome.stdout.strip() == '[]'
