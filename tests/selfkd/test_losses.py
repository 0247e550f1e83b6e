"""The loss math against closed forms, torch's own losses and a plain float64 re-statement of the papers."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from selfkd.losses import (
    TopK,
    cskd_loss,
    distillation_kl,
    progressive_targets,
    pskd_cross_entropy,
    pskd_loss,
    soft_cross_entropy,
    tfkd_regularization,
)


def restated_pskd(logits, labels, past, alpha):
    """PS-KD, eq. 2 and 3, in float64 and without any shortcut: per-sample losses [N, ...]."""
    logits, past = logits.double(), past.double()
    onehot = torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1)
    target = (1 - alpha) * onehot + alpha * past
    log_probs = logits - logits.exp().sum(1, keepdim=True).log()
    return -(target * log_probs).sum(1)


def draw_batch(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    past = torch.randn(shape, generator=generator).softmax(1)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    return logits, labels, past


shapes = st.one_of(
    st.tuples(st.integers(1, 6), st.integers(2, 9)),
    st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(1, 4), st.integers(1, 4)),
)


@settings(deadline=None, max_examples=60)
@given(shape=shapes, alpha=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_pskd_equals_the_restated_paper(shape, alpha, seed):
    logits, labels, past = draw_batch(seed, *shape)
    logits.requires_grad_()
    reference_logits = logits.detach().double().requires_grad_()
    losses = pskd_loss(logits, labels, past, alpha, reduction='none')
    reference = restated_pskd(reference_logits, labels, past, alpha)
    torch.testing.assert_close(losses.double(), reference, rtol=1e-5, atol=1e-5)
    losses.mean().backward()
    reference.mean().backward()
    torch.testing.assert_close(logits.grad.double(), reference_logits.grad, rtol=1e-4, atol=1e-6)
    dense = soft_cross_entropy(logits, progressive_targets(labels, past, alpha), reduction='none')
    torch.testing.assert_close(losses, dense, rtol=1e-4, atol=1e-5)


def test_pskd_by_hand():
    """z = (0, ln 3): p = (1/4, 3/4). y = 0, past = (1/2, 1/2), alpha = 1/2: target (3/4, 1/4)."""
    logits = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    loss = pskd_loss(logits, torch.tensor([0]), torch.tensor([[0.5, 0.5]]), 0.5)
    assert loss.item() == pytest.approx(0.75 * math.log(4) + 0.25 * math.log(4 / 3))
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25 - 0.75, 0.75 - 0.25]]))  # softmax minus target


@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
@pytest.mark.parametrize('shape', [(5, 7), (2, 5, 3, 4)])
def test_alpha_0_is_cross_entropy_in_value_and_gradient(shape, reduction):
    logits, labels, past = draw_batch(0, *shape)
    labels.view(-1)[0] = 255
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a = pskd_loss(ours, labels, past, 0.0, ignore_index=255, reduction=reduction)
    b = F.cross_entropy(theirs, labels, ignore_index=255, reduction=reduction)
    torch.testing.assert_close(a, b)
    a.sum().backward()
    b.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize('past', ['dense', 'top_k', 'per_sample_alpha', 'probs'])
def test_gradcheck(past):
    logits, labels, probs = draw_batch(1, 4, 6)
    probs, alpha, hard = probs.double(), 0.3, labels
    if past == 'top_k':
        probs = TopK(*probs.topk(2, 1))
    if past == 'per_sample_alpha':
        alpha = torch.tensor([0.0, 0.2, 1.0, 0.7], dtype=torch.float64)
    if past == 'probs':
        hard = torch.rand(4, 6, dtype=torch.float64).softmax(1)
    z = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: pskd_loss(z, hard, probs, alpha, reduction='none'), z)


def test_top_k_past_equals_its_dense_form():
    logits, labels, past = draw_batch(2, 6, 40)
    top = TopK(*past.topk(5, 1))
    torch.testing.assert_close(top.dense(40).sum(1), torch.ones(6))
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    pskd_loss(a, labels, top, 0.6).backward()
    pskd_loss(b, labels, top.dense(40), 0.6).backward()
    torch.testing.assert_close(a.grad, b.grad)
    full = TopK(*past.topk(40, 1))  # k = C loses nothing
    torch.testing.assert_close(full.dense(40), past)


def test_per_sample_alpha_trains_new_samples_on_labels_alone():
    logits, labels, past = draw_batch(3, 4, 5)
    seen = torch.tensor([True, False, True, False])
    losses = pskd_loss(logits, labels, past, 0.8 * seen, reduction='none')
    torch.testing.assert_close(losses[~seen], F.cross_entropy(logits, labels, reduction='none')[~seen])
    torch.testing.assert_close(losses[seen], pskd_loss(logits, labels, past, 0.8, reduction='none')[seen])


@pytest.mark.parametrize('weight', [None, torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)])
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
@pytest.mark.parametrize('probs', [False, True])
def test_with_keep_hard_the_labels_term_stays_whole(reduction, weight, probs):
    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    past, target = torch.rand(6, 4).double().softmax(1), torch.randint(4, (6,))
    target = F.one_hot(target, 4).double() if probs else target
    alpha, options = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), dict(weight=weight, reduction=reduction)
    loss, parts = pskd_cross_entropy(logits, target, past, alpha, keep_hard=True, return_parts=True, **options)
    mixed, mixed_parts = pskd_cross_entropy(logits, target, past, alpha, return_parts=True, **options)
    hard = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(parts.hard, hard.detach())
    torch.testing.assert_close(loss, hard + mixed_parts.soft)
    torch.testing.assert_close(mixed, mixed_parts.hard + mixed_parts.soft)
    (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    soft = soft_cross_entropy(logits, past, class_weight=weight, reduction='none')
    divisor = 1 if reduction != 'mean' else 6 if weight is None or probs else weight[target].sum()
    (expected,) = torch.autograd.grad(hard.sum() + (alpha * soft / divisor).sum(), logits)
    torch.testing.assert_close(gradient, expected)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_permuting_classes_or_samples_changes_nothing(seed):
    logits, labels, past = draw_batch(seed, 5, 7)
    generator = torch.Generator().manual_seed(seed)
    loss = pskd_loss(logits, labels, past, 0.4)
    classes, samples = torch.randperm(7, generator=generator), torch.randperm(5, generator=generator)
    relabelled = classes.argsort()[labels]
    torch.testing.assert_close(pskd_loss(logits[:, classes], relabelled, past[:, classes], 0.4), loss)
    torch.testing.assert_close(pskd_loss(logits[samples], labels[samples], past[samples], 0.4), loss)


def test_ignored_positions_neither_count_nor_carry_gradient():
    logits, labels, past = draw_batch(4, 2, 5, 3, 3)
    labels[0] = 255
    logits.requires_grad_()
    loss = pskd_loss(logits, labels, past, 0.5, ignore_index=255)
    loss.backward()
    assert not logits.grad[0].any()
    torch.testing.assert_close(loss, pskd_loss(logits[1:], labels[1:], past[1:], 0.5))


@pytest.mark.parametrize('case', ['no samples', 'all ignored'])
def test_nothing_to_average_is_a_zero_joined_to_the_graph(case):
    logits, labels, past = draw_batch(5, 3, 4)
    if case == 'no samples':
        logits, labels, past = logits[:0], labels[:0], past[:0]
    else:
        labels[:] = -100
    logits.requires_grad_()
    loss = pskd_loss(logits, labels, past, 0.5, ignore_index=-100)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == logits.shape
    assert not logits.grad.any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, labels, past = draw_batch(6, 8, 100, dtype=dtype)
    loss = pskd_loss(logits, labels, past.to(dtype), 0.5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pskd_loss(logits.float(), labels, past.to(dtype).float(), 0.5))


def test_autocast_changes_nothing_for_float32_inputs():
    logits, labels, past = draw_batch(7, 800, 6000)  # large enough for the path that works in slices
    plain = pskd_loss(logits, labels, past, 0.5)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(pskd_loss(logits, labels, past, 0.5), plain, rtol=0, atol=0)
    torch.testing.assert_close(plain, restated_pskd(logits, labels, past, 0.5).mean().float())


def test_no_gradient_flows_into_the_past():
    logits, labels, past = draw_batch(8, 3, 4)
    past.requires_grad_()
    pskd_loss(logits.requires_grad_(), labels, past, 0.5).backward()
    assert past.grad is None


def test_class_weight_is_that_of_torchs_soft_cross_entropy():
    logits, _, target = draw_batch(9, 5, 4)
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0])
    torch.testing.assert_close(
        soft_cross_entropy(logits, target, class_weight=weight), F.cross_entropy(logits, target, weight=weight)
    )


def test_distillation_kl_by_hand():
    """T = 2, teacher (0, 2 ln 3) and student (0, 0): KL((1/4, 3/4) || (1/2, 1/2)) = ln 2 - H(1/4), times T^2."""
    student = torch.zeros(1, 2, requires_grad=True)
    teacher = torch.tensor([[0.0, 2 * math.log(3)]], requires_grad=True)
    loss = distillation_kl(student, teacher, temperature=2.0)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert loss.item() == pytest.approx(4 * (math.log(2) - entropy), rel=1e-6)
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, torch.tensor([[2 * (0.5 - 0.25), 2 * (0.5 - 0.75)]]))  # T (p - q)


def test_distillation_kl_reductions():
    student, teacher = draw_batch(10, 2, 5, 3, 3)[0], draw_batch(11, 2, 5, 3, 3)[0]
    each = distillation_kl(student, teacher, reduction='none')
    assert each.shape == (2, 3, 3)
    torch.testing.assert_close(distillation_kl(student, teacher), each.sum() / 2)
    torch.testing.assert_close(distillation_kl(student, teacher, reduction='mean'), each.mean())
    assert distillation_kl(student, student).item() == pytest.approx(0, abs=1e-6)


def masked(logits, *classes):
    return logits.index_fill(1, torch.tensor(classes), -math.inf)


@pytest.mark.parametrize('shape', [(5, 7), (2, 7, 3, 4)])
def test_classes_masked_by_minus_infinity_are_as_if_they_were_not_there(shape):
    logits, labels, _ = draw_batch(13, *shape)
    labels %= 4
    past_logits = draw_batch(14, *shape)[0]
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    x, past = masked(a, 4, 6), masked(past_logits, 4, 6)
    y, past_of_five = b[:, [0, 1, 2, 3, 5]], past_logits[:, [0, 1, 2, 3, 5]]
    pairs = [
        (pskd_loss(x, labels, past.softmax(1), 0.5), pskd_loss(y, labels, past_of_five.softmax(1), 0.5)),
        (soft_cross_entropy(x, past.softmax(1)), soft_cross_entropy(y, past_of_five.softmax(1))),
        (distillation_kl(x, past), distillation_kl(y, past_of_five)),
        (cskd_loss(x, labels, past), cskd_loss(y, labels, past_of_five)),
    ]
    if len(shape) == 2:
        top, top_of_five = TopK(*past.softmax(1).topk(6, 1)), TopK(*past_of_five.softmax(1).topk(5, 1))
        pairs.append((pskd_loss(x, labels, top, 0.5), pskd_loss(y, labels, top_of_five, 0.5)))
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected)
    sum(ours for ours, _ in pairs).backward()
    sum(expected for _, expected in pairs).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_a_share_of_0_stays_0_where_the_past_does_not_know_the_mask():
    """A sample without a past comes with alpha 0 and the uniform distribution, masked classes included."""
    logits, labels, _ = draw_batch(15, 4, 5)
    labels %= 3
    uniform = torch.full((4, 5), 0.2)
    for past in (uniform, TopK(*uniform.topk(2, 1))):
        for alpha in (torch.zeros(4), 0.0):
            x = logits.clone().requires_grad_()
            loss = pskd_loss(masked(x, 4), labels, past, alpha)
            torch.testing.assert_close(loss, F.cross_entropy(logits[:, :4], labels))
            loss.backward()
            assert x.grad.isfinite().all()
    top = TopK(torch.full((4, 2), 0.4), torch.tensor([[0, 1]]).repeat(4, 1))  # 0.2 spread over classes 2, 3 and 4
    x = logits.clone().requires_grad_()
    loss = pskd_loss(masked(x, 4), labels, top, 0.5)
    log_probs = logits[:, :4].log_softmax(1)
    expected = -0.5 * log_probs.gather(1, labels[:, None]).mean() - 0.2 * log_probs[:, :2].sum(1).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('past', [None, 'dense', 'top_k'])
def test_predictions_that_are_not_finite_stay_visible(past):
    logits, labels, probs = draw_batch(16, 4, 5)
    logits[2] = math.nan
    past = {'dense': probs, 'top_k': TopK(*probs.topk(2, 1)), None: None}[past]
    losses = pskd_loss(logits, labels, past, 0.0 if past is None else 1.0, reduction='none')
    assert losses.isnan().tolist() == [False, False, True, False]
    assert distillation_kl(logits, probs, reduction='none').isnan().tolist() == [False, False, True, False]


def test_what_is_ignored_may_hold_anything():
    logits, labels, past = draw_batch(17, 4, 5)
    labels[1] = 255
    expected = pskd_loss(logits[[0, 2, 3]], labels[[0, 2, 3]], past[[0, 2, 3]], 0.5)
    past[1] = math.nan
    logits.requires_grad_()
    loss = pskd_loss(logits, labels, past, 0.5, ignore_index=255)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not logits.grad[1].any()
    with torch.no_grad():
        logits[1] = math.nan
    torch.testing.assert_close(pskd_loss(logits, labels, past, 0.5, ignore_index=255), expected)


def test_a_single_class_costs_nothing():
    logits, labels, past = torch.randn(3, 1, requires_grad=True), torch.zeros(3, dtype=torch.long), torch.ones(3, 1)
    for loss in (
        pskd_loss(logits, labels, past, 0.5),
        pskd_loss(logits, labels, past, 0.5, label_smoothing=0.1),
        pskd_loss(logits, labels, TopK(past, labels[:, None]), 0.5),
        tfkd_regularization(logits, labels),
    ):
        loss.backward()
        assert loss.item() == 0
    assert logits.grad.abs().max() < 1e-6


def test_a_million_classes_in_float16_are_a_distribution():
    """Each probability is rounded to float16's smallest steps: the uniform distribution adds up to 1.013."""
    past = torch.full((1, 10**6), 1e-6).half()
    assert past.float().sum() > 1.01
    soft_cross_entropy(torch.zeros(1, 10**6), past)


@pytest.mark.parametrize('past', ['dense', 'top_k', 'probs', 'ignored', 'smoothed'])
def test_torch_func_and_compile_see_the_same_function(past):
    """Gradients by autograd, by torch.func, per sample by vmap, and by torch.compile without a graph break."""
    logits, labels, probs = draw_batch(18, 4, 6)
    settings = {'ignored': {'ignore_index': 3}, 'smoothed': {'label_smoothing': 0.1}}.get(past, {})
    hard = probs.flip(0) if past == 'probs' else labels
    past = TopK(*probs.topk(2, 1)) if past == 'top_k' else probs

    def loss(z, hard, past):
        return pskd_loss(z, hard, past, 0.5, reduction='sum', **settings) + distillation_kl(z, z.flip(1)).sum()

    z = logits.clone().requires_grad_()
    loss(z, hard, past).backward()
    torch.testing.assert_close(torch.func.grad(loss)(logits, hard, past), z.grad)

    def of_sample(z, hard, past):
        past = TopK(past.values[None], past.classes[None]) if isinstance(past, TopK) else past[None]
        kl = distillation_kl(z[None], z.flip(0)[None]) / len(logits)  # averaged over the samples
        return pskd_loss(z[None], hard[None], past, 0.5, reduction='sum', **settings) + kl

    torch.testing.assert_close(torch.vmap(torch.func.grad(of_sample))(logits, hard, past), z.grad)
    z = logits.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend='aot_eager')(z, hard, past).backward()
    torch.testing.assert_close(torch.func.grad(loss)(logits, hard, past), z.grad)


Z, Y, P = draw_batch(12, 3, 4)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: pskd_loss(Z, Y, P, 1.5), r'alpha: must lie in \[0, 1\], got 1.5'),
        (lambda: pskd_loss(Z, Y, P, float('nan')), r'alpha: must lie in \[0, 1\], got nan'),
        (lambda: pskd_loss(Z, Y, P, torch.tensor([0.0, 2.0, 1.0])), r'alpha: must lie in \[0, 1\], got values from'),
        (lambda: pskd_loss(Z, Y, P, torch.zeros(2)), r'alpha: a tensor must have shape \(3,\)'),
        (lambda: pskd_loss(Z, Y, P[:, :3], 0.5), r'past_probs: must be floating with shape \(3, 4\)'),
        (lambda: pskd_loss(Z, Y, Z, 0.5), r'past_probs: each distribution .* sum to 1 .*logits instead'),
        (lambda: pskd_loss(Z, Y, P * float('nan'), 0.5), r'past_probs: .* not finite: training has diverged'),
        (lambda: soft_cross_entropy(Z[:1, :3], torch.tensor([[2.0, -1, 0]])), r'non-negative .* values from -1'),
        (lambda: pskd_loss(Z, Y, TopK(P[:, :2] - 1, P[:, :2].long()), 0.5), r'past_probs: each distribution must'),
        (lambda: pskd_loss(Z, Y, None, 0.5), r'past_probs: None is allowed with alpha=0 only'),
        (lambda: pskd_loss(Z, Y + 4, P, 0.5), r'labels_or_probs: class ids must lie in \[0, 4\)'),
        (lambda: pskd_loss(Z, Y[:2], P, 0.5), r'labels_or_probs: class ids must have shape \(3,\)'),
        (lambda: pskd_loss(Z, P, P, 0.5, ignore_index=1), r'ignore_index: needs class ids'),
        (lambda: pskd_loss(Z, Y, P, 0.5, reduction='avg'), r"reduction: must be one of .*'mean'.* got 'avg'"),
        (lambda: pskd_loss(Z, Y, TopK(P[:, :2], Y), 0.5), r'past_probs: TopK needs values and classes \[N, k\]'),
        (lambda: pskd_loss(Z.long(), Y, P, 0.5), r'logits: must be floating'),
        (lambda: progressive_targets(Y, TopK(*P.topk(2, 1)), 0.5), r'num_classes: needed'),
        (lambda: progressive_targets(Y, P, 0.5, num_classes=5), r'num_classes: past_probs has 4 classes, got 5'),
        (lambda: distillation_kl(Z, Z[:, :3]), r'teacher_logits: must have the shape'),
        (lambda: distillation_kl(Z, Z, temperature=0), r'temperature: must be above 0, got 0'),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_class_weights_in_the_logits_half_precision_work_with_a_past():
    logits, past = torch.randn(4, 3).bfloat16(), torch.full((4, 3), 1 / 3)
    target, weight = torch.tensor([0, 1, 2, 1]), torch.tensor([1.0, 2.0, 4.0])
    half = pskd_cross_entropy(logits, target, past, 0.5, weight=weight.bfloat16())
    torch.testing.assert_close(half, pskd_cross_entropy(logits.float(), target, past, 0.5, weight=weight))


CASES = {
    'ids': lambda z, y, p, q: pskd_loss(z, y, p, 0.3, ignore_index=int(y[0]), label_smoothing=0.1),
    'probs': lambda z, y, p, q: pskd_loss(z, q, p, 0.3),
    'probs, top-k': lambda z, y, p, q: pskd_loss(z, q, TopK(*p.topk(4, 1)), 0.3),
    'top-k': lambda z, y, p, q: pskd_loss(z, y, TopK(*p.topk(4, 1)), torch.linspace(0, 1, len(z))),
    'kl': lambda z, y, p, q: distillation_kl(z, p.log(), 3.0),
}


@pytest.mark.parametrize('case', CASES)
def test_a_few_samples_at_a_time_are_as_all_at_once_to_the_second_derivative(case, monkeypatch):
    logits, labels, past = draw_batch(21, 41, 13, dtype=torch.float64)
    other = draw_batch(22, 41, 13, dtype=torch.float64)[2]

    def outcome():
        z = logits.clone().requires_grad_()
        loss = CASES[case](z, labels, past, other)
        (first,) = torch.autograd.grad(loss, z)
        (again,) = torch.autograd.grad(CASES[case](z, labels, past, other), z, create_graph=True)
        return loss, first, again, *torch.autograd.grad(again.pow(2).sum(), z)

    whole = outcome()
    torch.testing.assert_close(whole[1], whole[2])
    monkeypatch.setattr('selfkd.losses._common.NUMBERS_AT_ONCE', {'cpu': 7 * 13})
    for ours, expected in zip(outcome(), whole):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('case', CASES)
def test_the_gradient_is_the_same_however_it_is_asked_for(case, dtype):
    """On CPUs it is written in the forward pass, and used once, if it can be."""
    logits, labels, past = draw_batch(25, 12, 9)
    other, z = draw_batch(26, 12, 9)[2], (logits + 300).to(dtype).requires_grad_()
    exact = z.detach().double().requires_grad_()  # traced by plain autograd, as a second derivative needs it
    (expected,) = torch.autograd.grad(CASES[case](exact, labels, past, other), exact, create_graph=True)
    expected = expected.detach().to(dtype)
    loss = CASES[case](z, labels, past, other)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    torch.testing.assert_close(first, expected)
    first.zero_()  # whoever asked may do so
    (again,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(again, expected)
    (scaled,) = torch.autograd.grad(4 * CASES[case](z, labels, past, other), z)
    torch.testing.assert_close(scaled, 4 * expected)
    (CASES[case](z, labels, past, other) / 2).backward()
    (CASES[case](z, labels, past, other) / 2).backward()
    torch.testing.assert_close(z.grad, expected)


def test_a_checkpoint_drops_the_gradient_that_was_written_early():
    """As it drops all that is saved for the backward pass."""
    logits, labels, past = draw_batch(27, 12, 9)
    z = logits.requires_grad_()

    def early():
        gc.collect()
        tensors = (found for found in gc.get_objects() if type(found) is torch.Tensor)
        return [found.gradient for found in tensors if getattr(found, 'gradient', None) is not None]

    loss = pskd_loss(z, labels, past, 0.3)
    assert [gradient.shape for gradient in early()] == [z.shape]
    (expected,) = torch.autograd.grad(loss, z)
    assert not early()
    value = checkpoint(pskd_loss, z, labels, past, 0.3, use_reentrant=False)
    assert not early()
    (recomputed,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(recomputed, expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        value = pskd_loss(z, labels, past, 0.3)  # as if what is saved was moved away and back
    assert not early()
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], expected)


@pytest.mark.parametrize('top_k', [True, False])
def test_a_past_that_is_ignored_may_hold_anything_in_every_way_of_differentiating(top_k):
    logits, labels, past = draw_batch(28, 6, 5)
    labels[2] = -100
    spoilt = past.clone()
    spoilt[2] = math.nan

    def loss(z, past):
        past = TopK(*past.topk(3, 1)) if top_k else past
        return pskd_loss(z, labels, past, 0.3, ignore_index=-100)

    z = logits.clone().requires_grad_()
    for create_graph in (False, True):
        ours, clean = (torch.autograd.grad(loss(z, p), z, create_graph=create_graph)[0] for p in (spoilt, past))
        torch.testing.assert_close(ours, clean)
    torch.testing.assert_close(torch.func.grad(loss)(logits.detach(), spoilt), clean.detach())


@pytest.mark.parametrize('case', CASES)
def test_of_half_precision_logits_nothing_wider_is_kept(case):
    """What autograd keeps for the backward pass, besides the inputs, is numbers per sample."""
    logits, labels, past = draw_batch(23, 64, 50)
    other = draw_batch(24, 64, 50)[2]
    z, kept = logits.bfloat16().requires_grad_(), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = CASES[case](z, labels, past, other)
    inputs = {x.untyped_storage().data_ptr() for x in (z, past, other)}
    wide = [x for x in kept if x.dim() == 2 and x.shape[1] == 50 and x.untyped_storage().data_ptr() not in inputs]
    assert all(torch.equal(x, past.log()) for x in wide)  # the teacher's logits of the KL
    assert len(kept) > 1
    loss.backward()
    assert z.grad.dtype == torch.bfloat16
