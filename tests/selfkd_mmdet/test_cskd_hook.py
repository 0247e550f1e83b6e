"""CS-KD between regions in real MMDetection training runs."""

import pytest
import torch
import torch.nn.functional as F
from helpers.mmdet import CSKD, FRSKD, MODIFY, PSKD, Regions, config
from helpers.mmengine import assert_same_state, train
from mmcv.ops import box_iou_rotated
from mmdet.registry import TASK_UTILS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmengine.hooks import Hook
from mmengine.structures import InstanceData

from selfkd.pairing import same_class_partners
from selfkd.seeds import step_generator
from selfkd_mmdet import CSKDHook
from selfkd_mmdet.cskd_hook import objects_shown


def restated(logits, weight, avg_factor, pairs):
    """The term pair by pair; T 3, lambda 0.5."""
    total = torch.zeros(())
    for region, partner in zip(*pairs):
        p, q = F.softmax(logits[partner].detach() / 3, 0), F.softmax(logits[region] / 3, 0)
        total = total + 9 * (p * (p / q).log()).sum() * weight[region]
    return 0.5 * total / avg_factor


@TASK_UTILS.register_module(force=True)  # pytest also imports this file by its path, looking for doctests
class Nearness:
    """Takes the place of the IoU: how near the centres of objects and regions are."""

    def __call__(self, bboxes1, bboxes2, mode='iou', is_aligned=False):
        assert mode == 'iou'
        centres = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in map(get_box_tensor, (bboxes1, bboxes2))]
        return 1 / (1 + torch.cdist(*centres) / 64)


OTHERS = ['dynamic', 'mask scoring', 'point rend', 'sabl', 'double head', 'pisa']


class FarApart(Hook):
    """Predictions so far apart that their KL is not lost in float32's rounding, as one of 1e-6 is."""

    def before_train(self, runner):
        for name, weight in runner.model.named_parameters():
            if 'fc_cls.weight' in name:
                weight.data.mul_(30)


@pytest.mark.parametrize(
    'case',
    [
        'faster-rcnn',
        'one class, one image',
        'one class, own overlaps',
        'positives count double',
        'cascade',
        'cascade, FRSKD',
        'mask',
        'c4',
        *OTHERS,
    ],
)
def test_loss_and_gradient_recomputed(voc, tmp_path, case):
    """The gradient shows that partners are constants; FRSKD (of weight 0) does not get in the way.

    The pairs are drawn from the objects that MMDetection assigned the regions to, with the step's own random numbers.
    """
    case, *frskd = case.split(', ')
    options = {'model.train_cfg.rcnn.pos_weight': 2.0} if 'double' in case else {}
    if case == 'one class':  # pairs of objects in an image
        options = {'train_dataloader.batch_size': 1}
        if frskd == ['own overlaps']:
            options['model.train_cfg.rcnn.assigner.iou_calculator'] = dict(type='Nearness')
        frskd = []
    if frskd:
        options = {**FRSKD, 'model.roi_head.alpha': 0.0}
    model = case if case in MODIFY else 'faster-rcnn'
    cfg = config(voc, tmp_path, CSKD, model=model, **options)
    if case == 'pisa':
        cfg.model.train_cfg.rcnn.carl = None  # a loss of the class scores, too
    if case == 'one class':
        cfg.train_dataloader.dataset.pipeline.insert(3, dict(type='OneClass'))
    train(cfg, regions := Regions(), FarApart())
    if case == 'one class':
        assert any(len(objects.unique()) > 2 for step in regions.steps for objects in step['objects'])
    found = 0
    for iteration, step in enumerate(regions.steps):
        generator = step_generator(iteration)
        for stage, (logits, label, weight, avg_factor) in enumerate(step['calls']):
            z = logits.detach().clone().requires_grad_()
            factor = [1, 0.5][stage] if case == 'cascade' else 1
            image = step['rois'][stage][:, 0]
            partners = same_class_partners(label, step['objects'][stage], image, ignore=10, generator=generator)
            paired = partners != torch.arange(len(label))
            pairs = paired.nonzero().flatten(), partners[paired]
            term = factor * restated(z, weight, avg_factor, pairs)
            name = f's{stage}.loss_cskd' if case == 'cascade' else 'loss_cskd'
            assert step['outputs'][name] == pytest.approx(term.item(), rel=1e-3, abs=1e-6)
            found += term.item() > 0
            hard = factor * (F.cross_entropy(z, label, reduction='none') * weight).sum() / avg_factor
            (hard + term).backward()
            torch.testing.assert_close(logits.grad, z.grad, rtol=1e-3, atol=1e-6)
        losses = [v for k, v in step['outputs'].items() if 'loss' in k and k != 'loss']
        assert step['outputs']['loss'] == pytest.approx(sum(losses))
    assert found


def test_objects_of_rotated_boxes():
    """Two thin ones that cross have the same horizontal hull; regions of 5 columns tell them apart."""
    objects = torch.tensor([[50.0, 50, 40, 4, 0.8], [50.0, 50, 40, 4, -0.8], [20.0, 20, 10, 5, 0.1]])
    samples = [
        DetDataSample(gt_instances=InstanceData(bboxes=b, labels=torch.zeros(len(b)).long()))
        for b in (objects, objects[:0], objects[1:])
    ]
    near = torch.tensor([2.0, -1.0, 3.0, 1.0, 0.05])
    images, shown = torch.tensor([0.0, 0, 0, 2, 2]), torch.tensor([1, 0, 2, 1, 0])
    boxes = torch.stack([samples[int(i)].gt_instances.bboxes[j] for i, j in zip(images, shown)]) + near
    rois = torch.cat([images[:, None], boxes], dim=1)
    assert torch.equal(objects_shown(rois, torch.zeros(5).long(), samples, box_iou_rotated), shown)


def test_order_beside_pskd_does_not_matter(voc, tmp_path):
    """Both act on the plain loss: their terms add up."""
    runs = [train(config(voc, tmp_path / str(i), *hooks)) for i, hooks in enumerate([(PSKD, CSKD), (CSKD, PSKD)])]
    assert_same_state(*(run.model.state_dict() for run in runs))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match='temperature must be above 0, got 0'):
        CSKDHook(temperature=0)
    with pytest.raises(ValueError, match='weight must be at least 0, got -1'):
        CSKDHook(weight=-1)
