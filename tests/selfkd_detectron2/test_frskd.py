"""FRSKD of regions in real training runs of Detectron2."""

import copy

import make_toy_data
import pytest
import torch
import torch.nn.functional as F
from d2_runs import CSKD, FRSKD, PSKD, batches, config, load, train
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from selfkd.publish import publish_checkpoint


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    folder = tmp_path_factory.mktemp('VOCdevkit')
    make_toy_data.voc(folder, train_size=4, test_size=2)
    return folder


class Spy(HookBase):
    """Keeps, before each step, the detector, and what goes into the box predictor's losses and through the teacher."""

    def __init__(self):
        self.steps = []

    def before_train(self):
        heads = self.trainer.model.roi_heads
        method = heads.box_predictor.losses

        def losses(predictions, proposals):
            self.steps[-1].update(logits=predictions[0].detach(), proposals=copy.deepcopy(proposals))
            return method(predictions, proposals)

        heads.box_predictor.losses = losses
        teacher = heads.self_teacher
        self.handles = [
            teacher['pyramid'].register_forward_hook(self.pyramid),
            teacher['classifier'].register_forward_hook(self.classifier),
        ]

    def before_step(self):
        self.steps.append({})

    def pyramid(self, module, args, output):
        self.steps[-1].update(maps=[m.detach() for m in args[0]], refined=[m.detach() for m in output])

    def classifier(self, module, args, output):
        self.steps[-1].update(pooled=args[0].detach(), teacher=output.detach())

    def after_step(self):
        self.steps[-1].update({name: value for name, (value, _) in self.trainer.storage.latest().items()})

    def after_train(self):
        for handle in self.handles:
            handle.remove()


def attention(m):
    a = m.double().pow(2).mean(1).flatten(1)
    return a / a.norm(dim=1, keepdim=True)


@pytest.mark.parametrize('case', ['faster', 'mask'])
def test_losses_recomputed(voc, tmp_path, case):
    options = f'{FRSKD} SELFKD.FRSKD.ALPHA 0.5 SELFKD.FRSKD.BETA 3.0 SELFKD.FRSKD.TEMPERATURE 2.0 SOLVER.MAX_ITER 2'
    cfg = config(voc, tmp_path, case, options)
    trainer = train(cfg, spy := Spy())
    pooler = trainer.model.roi_heads.box_pooler
    for step in spy.steps:
        label = torch.cat([p.gt_classes for p in step['proposals']])
        pooled = pooler(step['refined'], [p.proposal_boxes for p in step['proposals']]).mean((2, 3))
        torch.testing.assert_close(step['pooled'], pooled)
        student, teacher = step['logits'].double(), step['teacher'].double()
        assert step['loss_cls'] == pytest.approx(F.cross_entropy(student, label).item(), rel=1e-4)
        assert step['loss_teacher'] == pytest.approx(F.cross_entropy(teacher, label).item(), rel=1e-4)
        p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
        assert step['loss_kd'] == pytest.approx(0.5 * 4 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-3)
        distances = [(attention(m) - attention(r)).pow(2).mean() for m, r in zip(step['maps'], step['refined'])]
        assert len(distances) == 4
        assert step['loss_feature'] == pytest.approx(3 * sum(distances).item(), rel=1e-3)
    assert ('loss_mask' in step) == (case == 'mask')


def test_self_teacher_learns_and_is_gone_at_inference(voc, tmp_path):
    cfg = config(voc, tmp_path, options=f'{FRSKD} SELFKD.FRSKD.BETA 1.0 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0')
    trainer = train(cfg)
    torch.manual_seed(0)
    start = build_model(cfg).state_dict()
    state = torch.load(tmp_path / 'model_final.pth')['model']
    own = [name for name in state if 'self_teacher' in name.split('.')]
    learnt = {n.split('self_teacher.')[1] for n in own if not torch.equal(state[n], start[n])}
    assert {'classifier.weight', 'pyramid.layers.0.top_down.0.0.weight'} <= learnt
    # What a vanilla detector loads strictly, and predicts the same with.
    assert publish_checkpoint(tmp_path / 'model_final.pth', tmp_path / 'published.pth') == len(own)
    vanilla = load(config(voc, tmp_path, options='MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0'), tmp_path / 'published.pth')
    trainer.model.eval()
    trainer.model.roi_heads.self_teacher = None
    with torch.no_grad():
        ours, theirs = ([x['instances'] for x in m(batches(cfg)[0])] for m in (trainer.model, vanilla))
    assert sum(len(x) for x in ours) > 0
    for a, b in zip(ours, theirs):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        ('faster', 'SELFKD.FRSKD.ALPHA -1.0', 'alpha and beta must be at least 0'),
        ('faster', 'SELFKD.FRSKD.TEMPERATURE 0.0', 'temperature above 0'),
        ('faster', 'MODEL.ROI_HEADS.IN_FEATURES ["p4"]', 'pyramid of two levels or more'),
        ('faster', 'MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True', 'USE_SIGMOID_CE False'),
        ('faster', 'MODEL.ROI_HEADS.NUM_CLASSES 20', 'NUM_CLASSES is 20, .* has 10 classes'),
        ('faster', PSKD, 'PSKDHook: GeneralizedRCNN with the ROI heads FRSKDROIHeads is not supported'),
        ('faster', CSKD, 'CSKDHook: GeneralizedRCNN with the ROI heads FRSKDROIHeads is not supported'),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(voc, tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        train(config(voc, tmp_path, model, f'{FRSKD} {options}'))


def test_backbone_learns_from_the_self_teachers_labels_alone(voc, tmp_path):
    """As in the paper: the KL and attention transfer send no gradient into the self-teacher, its labels do."""
    options = f'{FRSKD} SELFKD.FRSKD.ALPHA 1.0 SELFKD.FRSKD.BETA 1.0'
    cfg = config(voc, tmp_path, options=options)
    model = build_model(cfg).train()
    teacher = list(model.roi_heads.self_teacher.parameters())
    backbone = list(model.backbone.bottom_up.parameters())[:1]
    with EventStorage(0):
        losses = model(batches(cfg)[0])
    for name in ('loss_kd', 'loss_feature'):
        grads = torch.autograd.grad(losses[name], teacher, retain_graph=True, allow_unused=True)
        assert all(g is None or not g.any() for g in grads)
        assert torch.autograd.grad(losses[name], backbone, retain_graph=True)[0].any()
    assert torch.autograd.grad(losses['loss_teacher'], backbone)[0].any()
