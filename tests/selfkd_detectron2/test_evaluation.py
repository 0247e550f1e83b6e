"""Calibration of detections."""

import helpers.detectron2 as d2_runs  # noqa: F401 (skips)
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.structures import Boxes, BoxMode, Instances
from helpers.processes import in_processes

from selfkd_detectron2 import DetectionCalibration

BOX, APART, DIFFICULT = [1.0, 1, 10, 10], [50.0, 50, 60, 60], [20.0, 20, 30, 30]
OBJECT = """<object><name>a</name><pose/><truncated>0</truncated><difficult>{}</difficult>
    <bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def detections(*found):
    """(box, score, class) each."""
    boxes, scores, labels = zip(*found) if found else ((), (), ())
    return Instances(
        (99, 99),
        pred_boxes=Boxes(torch.tensor(boxes).view(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(labels, dtype=torch.long),
    )


def evaluate(metric, *images):
    metric.reset()
    for i, found in enumerate(images):
        metric.process([{'image_id': str(i)}], [{'instances': found}])
    return metric.evaluate()['calibration']


def voc(folder):
    """Three images with an object of class a and a difficult one each."""
    for name in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (folder / name).mkdir(parents=True)
    # In VOC's files the first pixel is number 1.
    first, second = (OBJECT.format(d, box[0] + 1, box[1] + 1, *box[2:]) for d, box in ((0, BOX), (1, DIFFICULT)))
    first, second = (text.replace('.0', '') for text in (first, second))
    for i in range(3):
        text = f'<annotation><size><width>99</width><height>99</height></size>{first}{second}</annotation>'
        (folder / f'Annotations/{i}.xml').write_text(text)
    (folder / 'ImageSets/Main/test.txt').write_text('0\n1\n2\n')
    name = f'calibration_{folder.name}'
    register_pascal_voc(name, str(folder), 'test', 2012, ['a', 'b'])
    MetadataCatalog.get(name).evaluator_type = 'pascal_voc'
    return name


def crowd(folder):
    """The same, as COCO says it."""
    boxes = [dict(bbox=box, bbox_mode=BoxMode.XYXY_ABS, category_id=0) for box in (BOX, DIFFICULT)]
    images = [dict(image_id=str(i), height=99, width=99) for i in range(3)]
    for image in images:
        image['annotations'] = [dict(boxes[0], iscrowd=0), dict(boxes[1], iscrowd=1)]
    name = f'calibration_crowd_{folder.name}'
    DatasetCatalog.register(name, lambda: images)
    MetadataCatalog.get(name).evaluator_type = 'coco'
    return name


@pytest.mark.parametrize('register', [voc, crowd])
def test_hand_worked_error(register, tmp_path):
    """Right at 0.95; wrong: again at 0.85, another class at 0.45, elsewhere at 0.65 and 0.35; the rest is left out."""
    name = register(tmp_path)
    first = detections((BOX, 0.85, 0), (BOX, 0.95, 0), (BOX, 0.45, 1), (DIFFICULT, 0.75, 0), (APART, 0.04, 0))
    images = first, detections((APART, 0.65, 0), (APART, 0.35, 0)), detections()
    found = evaluate(DetectionCalibration(name), *images)
    assert found['detections'] == 5
    assert found['ece'] == pytest.approx(100 * (0.05 + 0.85 + 0.45 + 0.65 + 0.35) / 5, rel=1e-5)
    # In one bin errors cancel: 1 right of 5, mean score 0.65.
    assert evaluate(DetectionCalibration(name, bins=1), *images)['ece'] == pytest.approx(100 * (0.65 - 0.2), rel=1e-5)
    assert evaluate(DetectionCalibration(name, score_thr=0.9), first)['ece'] == pytest.approx(5, rel=1e-5)
    empty = evaluate(DetectionCalibration(name), detections())
    assert empty['ece'] != empty['ece']  # NaN
    assert empty['detections'] == 0

    def of_every_second(rank):
        torch.distributed.init_process_group('gloo')
        metric = DetectionCalibration(name)
        metric.process([{'image_id': str(rank)}], [{'instances': images[rank]}])
        return metric.evaluate()

    assert in_processes(tmp_path, of_every_second, 2) == [{'calibration': pytest.approx(found)}, None]


def test_equals_mmdetections(tmp_path):
    """On boxes that overlap in all ways, as selfkd_mmdet measures them."""
    mmdet = pytest.importorskip('selfkd_mmdet')
    generator = np.random.default_rng(0)

    def boxes(number):
        corners = generator.uniform(0, 40, (number, 2))
        return np.column_stack([corners, corners + generator.uniform(10, 30, (number, 2))]).astype('float32')

    images, samples, outputs = [], [], []
    for i in range(20):
        truth, labels, skipped = boxes(8), generator.integers(0, 2, 8), generator.integers(0, 2, 8)
        found, scores = boxes(60), generator.uniform(0, 1, 60).astype('float32')
        classes = generator.integers(0, 2, 60)
        one = [
            dict(bbox=box.tolist(), bbox_mode=BoxMode.XYXY_ABS, category_id=int(label), iscrowd=int(skip))
            for box, label, skip in zip(truth, labels, skipped)
        ]
        images.append(dict(image_id=str(i), height=99, width=99, annotations=one))
        outputs.append(detections(*zip(found.tolist(), scores.tolist(), classes.tolist())))
        parts = [
            dict(bboxes=truth[skipped == skip], labels=torch.from_numpy(labels[skipped == skip])) for skip in (0, 1)
        ]
        for part in parts:
            part['bboxes'] = torch.from_numpy(part['bboxes'])
        predicted = dict(bboxes=outputs[-1].pred_boxes.tensor, scores=outputs[-1].scores)
        predicted['labels'] = outputs[-1].pred_classes
        samples.append(dict(gt_instances=parts[0], ignored_instances=parts[1], pred_instances=predicted))
    name = f'calibration_{tmp_path.name}'
    DatasetCatalog.register(name, lambda: images)
    theirs = mmdet.DetectionCalibration()
    theirs.process(None, samples)
    theirs = theirs.evaluate(size=len(samples))
    ours = evaluate(DetectionCalibration(name), *outputs)
    assert 0 < ours['detections'] < 1200
    assert ours['detections'] == theirs['calibration/detections']
    assert ours['ece'] == pytest.approx(theirs['calibration/ece'])


def test_refusals(tmp_path):
    name = f'calibration_{tmp_path.name}'
    DatasetCatalog.register(name, lambda: [dict(image_id=0, height=9, width=9)])
    with pytest.raises(ValueError, match='has no annotations to compare detections with'):
        DetectionCalibration(name)
    with pytest.raises(ValueError, match='score_thr must lie'):
        DetectionCalibration(name, score_thr=1.0)
