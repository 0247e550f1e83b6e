"""FRSKD of regions in real training runs of Detectron2."""

import copy

import helpers.detectron2 as d2_runs
import pytest
import torch
import torch.nn.functional as F
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.utils.events import EventStorage
from helpers.detectron2 import FRSKD, batches, config, load, train

from selfkd.publish import publish_checkpoint
from selfkd_detectron2 import with_self_teacher


class Spy(HookBase):
    """Keeps, for each step, what goes into the losses of the box predictors and through the self-teacher, by stages."""

    def __init__(self):
        self.steps = []

    def before_train(self):
        heads = self.trainer.model.roi_heads
        predictor, teacher = heads.box_predictor, heads.self_teacher
        for module in predictor if isinstance(predictor, torch.nn.ModuleList) else [predictor]:
            module.losses = self.spied(module.losses)
        self.handles = [
            teacher['pyramid'].register_forward_hook(self.pyramid),
            *(classifier.register_forward_hook(self.classifier) for classifier in teacher['classifier']),
        ]

    def spied(self, method):
        def losses(predictions, proposals):
            self.steps[-1]['calls'].append((predictions[0].detach(), copy.deepcopy(proposals)))
            return method(predictions, proposals)

        return losses

    def before_step(self):
        self.steps.append({'calls': [], 'refined': [], 'teacher': []})

    def pyramid(self, module, args, output):
        self.steps[-1]['maps'] = [m.detach() for m in args[0]]
        self.steps[-1]['refined'].append([m.detach() for m in output])

    def classifier(self, module, args, output):
        self.steps[-1]['teacher'].append((args[0].detach(), output.detach()))

    def after_step(self):
        self.steps[-1].update({name: value for name, (value, _) in self.trainer.storage.latest().items()})

    def after_train(self):
        for handle in self.handles:
            handle.remove()


def attention(m):
    a = m.double().pow(2).mean(1).flatten(1)
    return a / a.norm(dim=1, keepdim=True)


def one_sample(pooler):
    """The detector's pooler, but with one sample for each point."""
    scales = [level.spatial_scale for level in pooler.level_poolers]
    return ROIPooler(pooler.output_size, scales, sampling_ratio=1, pooler_type='ROIAlignV2')


@pytest.mark.parametrize('case', ['faster', 'mask', 'panoptic', 'cascade', 'cascade mask'])
def test_losses_recomputed(voc, tmp_path, case):
    suffixes = [f'_stage{k}' for k in range(3)] if 'cascade' in case else ['']
    options = FRSKD + 'SELFKD.FRSKD.ALPHA 0.5 SELFKD.FRSKD.BETA 3 SELFKD.FRSKD.TEMPERATURE 2 SOLVER.MAX_ITER 2'
    trainer = train(config(voc, tmp_path, case, options), spy := Spy())
    heads = trainer.model.roi_heads
    assert len(heads.self_teacher['classifier']) == len(suffixes)
    for step in spy.steps:
        (refined,) = step['refined']
        assert len(step['calls']) == len(step['teacher']) == len(suffixes)
        for suffix, (logits, proposals), (pooled, teacher) in zip(suffixes, step['calls'], step['teacher']):
            label = torch.cat([p.gt_classes for p in proposals])
            expected = one_sample(heads.box_pooler)(refined, [p.proposal_boxes for p in proposals])
            torch.testing.assert_close(pooled, expected)
            student, teacher = logits.double(), teacher.double()
            assert step[f'loss_cls{suffix}'] == pytest.approx(F.cross_entropy(student, label).item(), rel=1e-4)
            assert step[f'loss_teacher{suffix}'] == pytest.approx(F.cross_entropy(teacher, label).item(), rel=1e-4)
            p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
            kl = (p * (p / q).log()).sum(1).mean().item()
            assert step[f'loss_kd{suffix}'] == pytest.approx(0.5 * 4 * kl, rel=1e-3, abs=1e-6)
        distances = [(attention(m) - attention(r)).pow(2).mean() for m, r in zip(step['maps'], refined)]
        assert len(distances) == 4
        assert step['loss_feature'] == pytest.approx(3 * sum(distances).item(), rel=1e-3)
        assert sum(name.startswith('loss_feature') for name in step) == 1
    assert ('loss_mask' in step) == ('mask' in case or case == 'panoptic')


def twin(name, model):
    """Of which of the detector's parameters this one of the self-teacher's classifiers is a copy."""
    stage, part, rest = name.split('classifier.')[1].split('.', 2)
    return f'roi_heads.{"box_head" if part == "0" else "box_predictor"}' + (
        ('.' + stage if model == 'cascade' else '') + ('.' if part == '0' else '.cls_score.') + rest
    )


@pytest.mark.parametrize('model', ['faster', 'cascade'])
def test_self_teacher_learns_and_is_gone_at_inference(voc, tmp_path, model):
    shown = 'MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0'
    cfg, plain = config(voc, tmp_path, model, FRSKD + shown), config(voc, tmp_path, model, shown)
    trainer = train(cfg)
    torch.manual_seed(0)
    start = build_model(with_self_teacher(cfg)).state_dict()
    state = torch.load(tmp_path / 'model_final.pth')['model']
    own = [name for name in state if 'self_teacher' in name.split('.')]
    learnt = {n.split('self_teacher.')[1] for n in own if not torch.equal(state[n], start[n])}
    stages = range(3 if model == 'cascade' else 1)
    assert {*(f'classifier.{k}.2.weight' for k in stages), 'pyramid.layers.0.top_down.0.0.weight'} <= learnt
    # The detector itself starts as it would without it, and the self-teacher's classifiers start as the detector's.
    for name in own:
        if 'classifier' in name:
            torch.testing.assert_close(start[name], start[twin(name, model)], rtol=0, atol=0)
    torch.manual_seed(0)
    vanilla = build_model(plain).state_dict()
    torch.testing.assert_close({n: v for n, v in start.items() if n not in own}, vanilla, rtol=0, atol=0)
    # What a vanilla detector loads strictly, and predicts the same with.
    assert publish_checkpoint(tmp_path / 'model_final.pth', tmp_path / 'published.pth') == len(own)
    vanilla = load(plain, tmp_path / 'published.pth')
    trainer.model.eval()
    trainer.model.roi_heads.self_teacher = None
    with torch.no_grad():
        ours, theirs = ([x['instances'] for x in m(batches(cfg)[0])] for m in (trainer.model, vanilla))
    assert sum(len(x) for x in ours) > 0
    for a, b in zip(ours, theirs):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes)


@ROI_HEADS_REGISTRY.register()
class OtherROIHeads(StandardROIHeads):
    """Somebody's own."""


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        ('faster', 'SELFKD.FRSKD.ALPHA -1', r'\(SELFKD.FRSKD\): alpha must be at least 0'),
        ('faster', 'SELFKD.FRSKD.TEMPERATURE 0', 'temperature must be above 0'),
        ('faster', 'MODEL.ROI_HEADS.IN_FEATURES ["p4"]', 'pyramid of two levels or more'),
        ('faster', 'MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True', 'USE_SIGMOID_CE False'),
        ('faster', 'MODEL.ROI_HEADS.NUM_CLASSES 20', 'NUM_CLASSES is 20, .* has 10 classes'),
        ('faster', 'MODEL.ROI_HEADS.NAME OtherROIHeads', 'does not work with MODEL.ROI_HEADS.NAME OtherROIHeads'),
        ('faster', 'SELFKD.FRSKD.ENABLED False MODEL.ROI_HEADS.NAME FRSKDROIHeads', 'set SELFKD.FRSKD.ENABLED True'),
        ('c4', '', 'does not work with MODEL.ROI_HEADS.NAME Res5ROIHeads: .* feature pyramid'),
        ('retinanet', '', 'does not work with MODEL.META_ARCHITECTURE RetinaNet'),
        ('cascade', 'MODEL.ROI_HEADS.IN_FEATURES ["p4"]', 'FRSKDCascadeROIHeads: .* pyramid of two levels or more'),
        ('cascade', 'MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True', 'FRSKDCascadeROIHeads: .*USE_SIGMOID_CE False'),
        ('cascade', 'MODEL.ROI_HEADS.NUM_CLASSES 20', 'NUM_CLASSES is 20, .* has 10 classes'),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(voc, tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        train(config(voc, tmp_path, model, FRSKD + options))


def test_model_without_the_self_teacher_that_the_config_asks_for_is_refused(voc, tmp_path):
    """A trainer that is not derived from ours would train the plain detector."""

    class OtherTrainer(d2_runs.Trainer):
        @classmethod
        def build_model(cls, cfg):
            return build_model(cfg)

    with pytest.raises(ValueError, match='without a self-teacher: derive the trainer from SelfKDTrainer'):
        train(config(voc, tmp_path, options=FRSKD), kind=OtherTrainer)


def test_box_head_that_ends_in_maps(voc, tmp_path):
    """A box head of convolutions alone hands maps to the classifier, which flattens them; so does the self-teacher."""
    convolutions = 'MODEL.ROI_BOX_HEAD.NUM_FC 0 MODEL.ROI_BOX_HEAD.NUM_CONV 1 MODEL.ROI_BOX_HEAD.CONV_DIM 8 '
    spy = Spy()
    train(config(voc, tmp_path, options=FRSKD + convolutions + 'SOLVER.MAX_ITER 2'), spy)
    assert spy.steps[-1]['loss_teacher'] > 0


@pytest.mark.parametrize('model', ['faster', 'cascade'])
def test_backbone_learns_from_the_self_teachers_labels_alone(voc, tmp_path, model):
    """As in the paper: the KL and attention transfer send no gradient into the self-teacher, its labels do.

    Cascade R-CNN divides the gradients that its stages send into the maps by their number; so does the self-teacher.
    """
    cfg = config(voc, tmp_path, model, FRSKD + 'SELFKD.FRSKD.ALPHA 1 SELFKD.FRSKD.BETA 1')
    stages = 3 if model == 'cascade' else 1
    detector = build_model(with_self_teacher(cfg)).train()
    own = detector.roi_heads.self_teacher
    regions, pooled = [], []
    own['pooler'].register_forward_pre_hook(lambda _, args: regions.append(args))
    for classifier in own['classifier']:
        classifier.register_forward_pre_hook(lambda _, args: pooled.append(args))
    backbone = list(detector.backbone.bottom_up.parameters())[:1]
    with EventStorage(0):
        losses = detector(batches(cfg)[0])
    taught = [name for name in losses if name.startswith(('loss_kd', 'loss_feature'))]
    assert len(taught) == stages + 1
    for name in taught:
        grads = torch.autograd.grad(losses[name], list(own.parameters()), retain_graph=True, allow_unused=True)
        assert all(g is None or not g.any() for g in grads)
        assert torch.autograd.grad(losses[name], backbone, retain_graph=True)[0].any()
    for k in range(stages):
        loss = losses[f'loss_teacher_stage{k}' if model == 'cascade' else 'loss_teacher']
        assert torch.autograd.grad(loss, backbone, retain_graph=True)[0].any()
        refined, boxes = regions[k]
        to_pooled, to_maps = torch.autograd.grad(loss, [*pooled[k], refined[0]], retain_graph=True)
        again = one_sample(detector.roi_heads.box_pooler)(refined, boxes)
        (unscaled,) = torch.autograd.grad(again, refined[0], to_pooled, retain_graph=True)
        assert unscaled.any()
        torch.testing.assert_close(stages * to_maps, unscaled)


def test_stage_without_regions(voc, tmp_path):
    """All boxes of a stage may leave the image: its terms are 0, and training goes on."""
    cfg = config(voc, tmp_path, 'cascade', FRSKD)
    detector = build_model(with_self_teacher(cfg)).train()
    predictor = detector.roi_heads.box_predictor[0]
    method = predictor.predict_boxes
    predictor.predict_boxes = lambda *args: [boxes * 0 for boxes in method(*args)]
    with EventStorage(0):
        losses = detector(batches(cfg)[0])
    assert losses['loss_teacher_stage0'] > 0
    for stage in (1, 2):
        assert losses[f'loss_teacher_stage{stage}'] == losses[f'loss_kd_stage{stage}'] == 0
    sum(losses.values()).backward()
