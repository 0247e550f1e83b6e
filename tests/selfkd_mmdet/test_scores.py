"""PS-KD where student and past copy score the same places: dense heads of any kind, and transformers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.mmdet import PSKD, config
from helpers.mmengine import train
from mmdet.models.dense_heads import CenterNetHead, CornerHead
from mmdet.registry import MODELS as DETECTORS
from mmengine.hooks import Hook
from torch import nn

from selfkd_mmdet.scores import check_scores, score_loss, scores, scoring_head

MODELS = ['rtmdet', 'yolox', 'ssd', 'tood', 'solo', 'deformable detr']


class Watch(Hook):
    """Keeps each step's scores, inputs, weights and logs."""

    priority = 'LOW'  # after the copy was made, which would have copied these hooks, too

    def __init__(self):
        self.steps = []

    def before_train(self, runner):
        model = runner.model
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        scoring_head(model).register_forward_hook(self._head)

    def _before(self, model, args, kwargs):
        self.steps.append(dict(inputs=kwargs['inputs'].clone(), samples=copy.deepcopy(kwargs['data_samples'])))
        self.steps[-1]['state'] = copy.deepcopy(model.state_dict())

    def _head(self, head, args, output):
        if 'scores' not in self.steps[-1]:
            queries = torch.is_tensor(output[0])
            self.steps[-1]['scores'] = scores(head, output, queries).detach()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps[-1]['logs'] = {name: float(value) for name, value in outputs.items() if value.numel() == 1}
        self.steps[-1]['epoch'] = runner.epoch


def run(voc, folder, model, *hooks, **options):
    watch = Watch()
    runner = train(config(voc, folder, *hooks, model=model, **options), watch)
    return runner, watch.steps


@pytest.mark.parametrize('model', MODELS)
def test_the_past_scores_the_students_places(voc, tmp_path, model):
    runner, steps = run(voc, tmp_path, model, dict(PSKD, teacher_mode='eval'))
    hook = next(hook for hook in runner.hooks if hasattr(hook, 'past'))
    assert [('loss_pskd' in step['logs']) for step in steps] == [step['epoch'] > 0 for step in steps]
    last, first = steps[-1], next(step for step in steps if step['epoch'] == 1)
    teacher = copy.deepcopy(runner.model).eval()
    teacher.load_state_dict(first['state'])  # as they were when the epoch began
    places = hook._places
    if places.queries:  # those of the student follow from its own decoder: only how many
        assert len(last['scores']) == 2 * 2 * 12  # layers, images, queries
        return
    head = scoring_head(teacher)
    head.training = True  # SOLO's gives other things for inference
    with torch.no_grad():
        past = scores(head, head(teacher.extract_feat(last['inputs'])))
    expected = 0.8 * score_loss(head, last['scores'], past)
    assert last['logs']['loss_pskd'] == pytest.approx(float(expected), rel=1e-4)
    assert last['logs']['pskd_soft'] == last['logs']['loss_pskd']


def test_the_copys_decoder_is_asked_the_students_queries(voc, tmp_path):
    """With the weights of the student the copy then gives what the student gave."""
    runner, steps = run(voc, tmp_path, 'deformable detr', dict(PSKD, teacher_mode='eval'))
    hook = next(hook for hook in runner.hooks if hasattr(hook, 'past'))
    student = runner.model.eval()
    hook.past.begin_period(student)
    inputs, samples = steps[-1]['inputs'], steps[-1]['samples']
    listening = hook._places.attach(student, lambda: True)
    moved = student.query_embedding.weight.data.add_(
        0.5
    ).clone()  # the student is asked other queries than the copy has
    with torch.no_grad():
        found = student.forward_transformer(student.extract_feat(inputs), samples)
        ours = scores(student.bbox_head, student.bbox_head(found['hidden_states'], found['references']), queries=True)
    past = hook._places.scores(inputs, samples)
    assert torch.allclose(past, ours, atol=1e-4)
    assert not torch.equal(hook.past.model.query_embedding.weight, moved)
    for handle in listening:
        handle.remove()
    with pytest.raises(RuntimeError, match='does not call its decoder with query='):  # nothing was noted
        hook._places.scores(inputs, samples)


@pytest.mark.parametrize('model', ['rtmdet', 'deformable detr'])
def test_a_forward_that_hands_on_its_arguments(voc, tmp_path, model):
    cfg = config(voc, tmp_path, PSKD, model=model)
    head = DETECTORS.get(cfg.model.bbox_head.type)
    own = type('HandingOn', (head,), {'forward': lambda self, *args, **kwargs: head.forward(self, *args, **kwargs)})
    DETECTORS.register_module(module=own, force=True)
    cfg.model.bbox_head.type = 'HandingOn'
    train(cfg, watch := Watch())
    assert watch.steps[-1]['logs']['loss_pskd'] > 0


def test_a_score_of_class_times_objectness_is_the_products_logit():
    head = nn.Module()
    head.num_classes, head.loss_obj = 3, nn.Identity()
    classes, objectness = torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4)
    found = scores(head, ([classes], [torch.zeros(2, 4, 4, 4)], [objectness]))
    expected = (classes.sigmoid() * objectness.sigmoid()).permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.allclose(found.sigmoid(), expected, atol=1e-6)
    certain = scores(head, ([torch.full((1, 3, 1, 1), 60.0)], [], [torch.full((1, 1, 1, 1), 60.0)]))
    assert certain.isfinite().all()


def test_a_head_that_only_inherits_the_loss_of_objectness_has_none():
    """As of heads made from YOLOv5's that score classes alone."""
    head = nn.Module()
    head.num_classes, head.loss_obj = 3, nn.Identity()
    classes, boxes = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, 4)
    expected = classes.permute(0, 2, 3, 1).reshape(-1, 3)
    for others in ([boxes], [[boxes], [torch.zeros(2, 16, 4, 8)]], [[boxes], None]):
        assert torch.equal(scores(head, ([classes], *others)), expected)


def test_heads_that_give_probabilities_have_their_logits_taken_and_unknown_ones_are_refused():
    center = CenterNetHead(in_channels=4, feat_channels=4, num_classes=3)
    output = center([torch.randn(2, 4, 5, 5)])
    found = scores(center, output)
    assert torch.allclose(found.sigmoid(), output[0][0].permute(0, 2, 3, 1).reshape(-1, 3), atol=1e-5)
    assert found.requires_grad

    class Own(nn.Module):
        num_classes = 3

    logits = torch.rand(4, 3)
    with pytest.raises(ValueError, match=r'what Own gives for classes lies between .* seems to be probabilities'):
        check_scores('PSKDHook', Own(), logits)
    check_scores('PSKDHook', Own(), logits - 4.6)


def test_both_kinds_of_corners_have_classes():
    corner = CornerHead(num_classes=3, in_channels=4, num_feat_levels=1)
    assert len(scores(corner, corner([torch.randn(1, 4, 8, 8)]))) == 2 * 64


def test_yolov3s_one_map_is_taken_apart():
    head = nn.Module()
    head.num_classes, head.num_attrib = 2, 7
    level = torch.randn(1, 3 * 7, 2, 2)
    found = scores(head, ([level],))
    one = level[0, 7:14, 1, 0]  # the second anchor of a place
    expected = one[4].sigmoid() * one[5:].sigmoid()
    assert torch.allclose(found.view(2, 2, 3, 2)[1, 0, 1].sigmoid(), expected, atol=1e-6)


def test_the_terms_are_divided_by_the_objects_that_the_past_expects():
    sigmoid, softmax = nn.Module(), nn.Module()
    sigmoid.use_sigmoid_cls, softmax.use_sigmoid_cls = True, False
    logits, past = torch.randn(50, 4), torch.randn(50, 4)
    p = past.sigmoid()
    qfl = ((logits.sigmoid() - p) ** 2 * F.binary_cross_entropy(logits.sigmoid(), p, reduction='none')).sum()
    assert float(score_loss(sigmoid, logits, past.clone())) == pytest.approx(float(qfl / p.amax(1).sum()), rel=1e-4)
    q = past.softmax(1)
    ce = -(q * logits.log_softmax(1)).sum()
    assert float(score_loss(softmax, logits, past)) == pytest.approx(float(ce / q[:, :3].amax(1).sum()), rel=1e-4)
    nothing = torch.full((5, 4), -9.0)
    assert float(score_loss(sigmoid, nothing, nothing.clone())) < 1e-3  # not divided by next to nothing


def test_places_that_a_head_rules_out_are_left_out():
    head = nn.Module()
    head.use_sigmoid_cls = True
    logits, past = torch.randn(6, 2), torch.randn(6, 2)
    ruled_out = logits.clone()
    ruled_out[2] = -torch.inf
    keep = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(score_loss(head, ruled_out, past), score_loss(head, logits[keep], past[keep]))


def test_a_copy_that_scores_other_places_is_an_error():
    head = nn.Module()
    head.use_sigmoid_cls = True
    with pytest.raises(RuntimeError, match=r'scores \(6, 2\) of the student, but \(5, 2\) of the past copy'):
        score_loss(head, torch.zeros(6, 2), torch.zeros(5, 2))


def test_a_head_that_gives_something_else_is_refused():
    head = nn.Module()
    head.num_classes = 3
    with pytest.raises(ValueError, match=r'first output of Module is \[\(1, 4, 2, 2\)\], no scores of 3 classes'):
        scores(head, ([torch.zeros(1, 4, 2, 2)],))


@pytest.mark.parametrize('name', ['background', 'keep_hard'])
def test_options_of_regions_are_refused(voc, tmp_path, name):
    with pytest.raises(ValueError, match=f'{name}=False is for two-stage'):
        run(voc, tmp_path, 'rtmdet', dict(PSKD, **{name: False}))


def test_a_second_call_of_the_head_is_an_error(voc, tmp_path):
    class Twice(Hook):
        def before_train(self, runner):
            model, loss = runner.model, runner.model.loss

            def twice(inputs, data_samples):
                loss(inputs, data_samples)
                return loss(inputs, data_samples)

            model.loss = twice

    with pytest.raises(RuntimeError, match='called more than once'):
        train(config(voc, tmp_path, PSKD, model='rtmdet'), Twice())


def test_a_later_step_without_the_head_is_an_error(voc, tmp_path):
    class Bypass(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 1:
                parameter = next(runner.model.parameters())
                runner.model.loss = lambda *args, **kwargs: {'loss_own': parameter.square().sum()}

    with pytest.raises(RuntimeError, match='was never called while the model computed its loss'):
        train(config(voc, tmp_path, PSKD, model='rtmdet'), Bypass())
