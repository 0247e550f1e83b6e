"""CS-KD's and FRSKD's losses: values worked by hand, and a float64 restatement of the papers' formulas."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from costs import peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from selfkd.losses import (
    attention_transfer,
    cskd_loss,
    distillation_kl,
    frskd_loss,
    hint_loss,
    overhaul_loss,
    quality_focal_loss,
)
from selfkd.losses._attention import attention_distance
from selfkd.losses._common import NUMBERS_AT_ONCE


def random_logits(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(student, teacher, temperature):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum() / len(p)


def ce(z, y):
    return -np.log(softmax(z)[np.arange(len(y)), y]).mean()


def attention(f):
    a = (f**2).mean(1).reshape(len(f), -1)
    return a / np.linalg.norm(a, axis=1, keepdims=True)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 6),
    c=st.integers(2, 7),
    temperature=st.floats(0.5, 8),
    weight=st.floats(0, 5),
    seed=st.integers(0, 1000),
)
def test_cskd_equals_the_formula(n, c, temperature, weight, seed):
    z, partner = random_logits(seed, n, c), random_logits(seed + 1, n, c)
    y = torch.arange(n) % c
    expected = ce(z.numpy(), y.numpy()) + weight * kl(z.numpy(), partner.numpy(), temperature)
    assert cskd_loss(z, y, partner, temperature=temperature, weight=weight).item() == pytest.approx(expected, abs=1e-9)


def test_cskd_closed_form():
    """T = 2: logits (0, 2 ln 3) halve to (0, ln 3), probabilities (1/4, 3/4), against a uniform prediction."""
    z, partner = torch.zeros(1, 2), torch.tensor([[0.0, 2 * math.log(3)]])
    expected = math.log(2) + 0.5 * 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert cskd_loss(z, torch.tensor([1]), partner, temperature=2.0, weight=0.5).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_cskd_sends_no_gradient_to_the_partner():
    z, partner = random_logits(0, 3, 4).requires_grad_(), random_logits(1, 3, 4).requires_grad_()
    cskd_loss(z, torch.tensor([0, 1, 2]), partner).backward()
    assert partner.grad is None
    assert z.grad.abs().sum() > 0


def test_cskd_with_weight_zero_is_cross_entropy():
    z, partner, y = random_logits(0, 5, 4), random_logits(1, 5, 4), torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(cskd_loss(z, y, partner, weight=0.0), F.cross_entropy(z, y))


def test_quality_focal_loss_is_least_at_its_target_unlike_the_focal_loss():
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    target = torch.full_like(p, 0.3)
    assert p[quality_focal_loss(p.logit(), target, reduction='none').argmin()].item() == pytest.approx(0.3, abs=1e-3)
    focal = -target * (1 - p) ** 2 * p.log() - (1 - target) * p**2 * (1 - p).log()
    assert p[focal.argmin()].item() > 0.4
    bce = F.binary_cross_entropy(p, target)
    torch.testing.assert_close(quality_focal_loss(p.logit(), target, gamma=0), bce)
    with pytest.raises(ValueError, match='gamma: must be 0 or at least 1'):
        quality_focal_loss(p, target, gamma=0.5)
    with pytest.raises(ValueError, match='target_probs: must have the shape of logits'):
        quality_focal_loss(p, target[:5])


def test_gradients_are_those_of_finite_differences():
    z, other = random_logits(0, 3, 4).requires_grad_(), random_logits(1, 3, 4)
    assert gradcheck(lambda z: cskd_loss(z, torch.tensor([0, 1, 2]), other, temperature=2.0, weight=3.0), z)
    for gamma, reduction in ((0, 'mean'), (2, 'sum'), (2, 'none')):
        loss = partial(quality_focal_loss, target_probs=other.sigmoid(), gamma=gamma, reduction=reduction)
        assert gradcheck(loss, z)
        assert gradgradcheck(loss, z)
    maps, target = random_logits(2, 2, 3, 2, 2).requires_grad_(), random_logits(3, 2, 5, 2, 2)
    assert gradcheck(lambda f: attention_transfer(f, target), maps)
    assert gradgradcheck(lambda f: attention_transfer(f, target), maps)
    levels, targets = [maps, random_logits(4, 3, 2, 5).requires_grad_()], [target, random_logits(5, 3, 1, 5)]
    assert gradcheck(lambda *f: frskd_loss(z, other, f, targets, None, alpha=0.0, beta=2.0)['loss_feature'], levels)
    assert gradcheck(lambda f: hint_loss(f, target[:, :3]), maps)
    assert gradcheck(lambda f: overhaul_loss(f, target[:, :3]), maps)


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    alpha=st.floats(0, 3),
    beta=st.floats(0.5, 100),
    seed=st.integers(0, 1000),
)
def test_frskd_equals_the_formula(sizes, alpha, beta, seed):
    z, t = random_logits(seed, 3, 5), random_logits(seed + 1, 3, 5)
    y = torch.tensor([0, 4, 2])
    feats = [random_logits(seed + s, 3, 2, s, s + 1) for s in sizes]
    maps = [random_logits(seed + 7 * s, 3, 4, s, s + 1) for s in sizes]
    at = sum(((attention(f.numpy()) - attention(m.numpy())) ** 2).mean() for f, m in zip(feats, maps))
    losses = frskd_loss(z, t, feats, maps, y, alpha=alpha, beta=beta, temperature=3.0)
    expected = ce(z.numpy(), y.numpy()) + ce(t.numpy(), y.numpy()) + alpha * kl(z.numpy(), t.numpy(), 3.0) + beta * at
    assert sum(losses.values()).item() == pytest.approx(expected, rel=1e-9)


def test_frskd_gradient_reaches_the_teacher_only_through_its_own_cross_entropy():
    z, t = random_logits(0, 2, 3).requires_grad_(), random_logits(1, 2, 3).requires_grad_()
    f, m = random_logits(2, 2, 2, 3, 3).requires_grad_(), random_logits(3, 2, 4, 3, 3).requires_grad_()
    y = torch.tensor([0, 2])
    sum(frskd_loss(z, t, [f], [m], y, alpha=2.0, beta=10.0).values()).backward()
    (own,) = torch.autograd.grad(F.cross_entropy(t, y), t)
    torch.testing.assert_close(t.grad, own)
    assert m.grad is None
    assert f.grad.abs().sum() > 0


def test_frskd_without_labels_leaves_the_cross_entropies_out_and_with_beta_zero_the_maps():
    z = random_logits(0, 2, 3)
    assert set(frskd_loss(z, z, [], [], None, alpha=1.0, beta=0.0)) == {'loss_kd'}


def test_attention_ignores_scale_and_channels():
    """a(F) is L2-normalised over positions and averaged over channels."""
    f = random_logits(0, 2, 3, 4, 4)
    assert attention_transfer(f, 5 * f.flip(1)).item() == pytest.approx(0, abs=1e-12)
    # one sample, two positions: a = (0.6, 0.8) against (0.8, 0.6)
    f, m = torch.tensor([[[0.6**0.5, 0.8**0.5]]]), torch.tensor([[[0.8**0.5, 0.6**0.5]]])
    assert attention_transfer(f, m).item() == pytest.approx(0.04, abs=1e-6)


def test_overhaul_by_hand():
    """margin -1: teacher -5 rises to -1; a student below it costs nothing, one above it (0, say) 1; over N = 2."""
    teacher = torch.tensor([[-5.0, -5.0, 2.0], [-0.5, 3.0, -0.5]])
    student = torch.tensor([[-4.0, 0.0, 1.0], [-2.0, 3.0, 0.5]])
    assert overhaul_loss(student, teacher, margin=-1.0).item() == pytest.approx((1 + 1 + 1) / 2)


def test_overhaul_is_halved_towards_the_fine_levels():
    z, f = torch.zeros(1, 2), torch.zeros(1, 1, 2, 2)
    losses = frskd_loss(z, z, [f] * 3, [f + 1] * 3, None, alpha=0.0, beta=1.0, feature_loss='overhaul')
    assert losses['loss_feature'].item() == pytest.approx(4 * (1 / 4 + 1 / 2 + 1))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    z, t = random_logits(0, 4, 6).to(dtype), random_logits(1, 4, 6).to(dtype)
    f, m = (random_logits(2, 4, 3, 5, 5) * 100).to(dtype), (random_logits(3, 4, 6, 5, 5) * 100).to(dtype)
    y = torch.tensor([0, 1, 2, 3])
    half = frskd_loss(z, t, [f], [m], y, alpha=2.0, beta=10.0)
    full = frskd_loss(z.float(), t.float(), [f.float()], [m.float()], y, alpha=2.0, beta=10.0)
    for name in full:
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], full[name], rtol=1e-2 if name == 'loss_kd' else 1e-5, atol=1e-5)


def test_empty_batches_give_a_zero_with_a_gradient():
    z = torch.zeros(0, 3, requires_grad=True)
    f = torch.zeros(0, 2, 4, 4, requires_grad=True)
    total = (
        cskd_loss(z, torch.zeros(0, dtype=torch.long), z)
        + attention_transfer(f, f)
        + hint_loss(f, f)
        + overhaul_loss(f, f)
    )
    total.backward()
    assert total.item() == 0
    assert z.grad.shape == (0, 3)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda z, f: cskd_loss(z, torch.tensor([0, 1]), z[:1]), 'teacher_logits: must have the shape'),
        (
            lambda z, f: cskd_loss(z, torch.tensor([0, 1]), z, weight=-1),
            'weight: must be a number of at least 0, got -1',
        ),
        (
            lambda z, f: cskd_loss(z, torch.tensor([0, 1]), z, temperature=0),
            'temperature: must be above 0, got 0',
        ),
        (lambda z, f: cskd_loss(z, torch.tensor([0, 3]), z), r'class ids must lie in \[0, 3\)'),
        (lambda z, f: attention_transfer(f, f[..., :2]), 'differ in channels only'),
        (lambda z, f: hint_loss(f, f[:, :1]), 'an adapter is missing'),
        (
            lambda z, f: frskd_loss(z, z, [f], [f, f], None, alpha=1, beta=1),
            'as many levels as teacher_feats, 2, got 1',
        ),
        (lambda z, f: frskd_loss(z, z, [f], [f], None, alpha=1, beta=float('nan')), 'beta: must be a number'),
        (
            lambda z, f: frskd_loss(z, z, [f], [f], None, alpha=1, beta=1, feature_loss='at'),
            "feature_loss: .* got 'at'",
        ),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3), torch.zeros(2, 2, 3, 3))


def test_kl_is_zero_for_equal_predictions_and_shifts():
    z = random_logits(0, 4, 5)
    assert distillation_kl(z, z + 7.0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_attention_transfer_takes_little_more_memory_than_its_gradient(dtype, monkeypatch):
    """From whole maps it took four to ten times theirs."""
    monkeypatch.setitem(NUMBERS_AT_ONCE, 'cpu', 2**12)
    student, teacher = torch.rand(99, 128, 16).to(dtype).requires_grad_(), torch.rand(99, 256, 16).to(dtype)
    peak = peak_bytes(lambda: torch.autograd.grad(attention_transfer(student, teacher), student))
    assert peak < 1.2 * student.numel() * student.element_size()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [1.0, 1e-3])
def test_half_precision_gradients_of_attention_transfer_are_rounded_once(dtype, scale):
    student, teacher = (torch.randn(2, c, 3, 3).mul(scale).to(dtype) for c in (4, 6))
    grads = []
    for maps in (student.requires_grad_(), student.detach().double().requires_grad_()):
        (grad,) = torch.autograd.grad(100 * attention_transfer(maps, teacher), maps)
        grads.append(grad)
    torch.testing.assert_close(grads[0], grads[1].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize('scale', [1e-30, 1e-20, 1e20, 1e30])
def test_attention_transfer_is_the_same_at_any_scale(scale):
    """Squares of such values are beyond float32."""
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    expected = attention_transfer(student, teacher)
    small = (student * scale).requires_grad_()
    loss = attention_transfer(small, teacher * scale)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    whole = student.clone().requires_grad_()
    attention_transfer(whole, teacher).backward()
    torch.testing.assert_close(small.grad * scale, whole.grad)
    assert attention_transfer(student * 0, teacher * 0) == 0


def test_a_small_temperature_does_not_overflow_half_precision():
    student, teacher = torch.tensor([[6e4, 0.0]]).half(), torch.tensor([[0.0, 6e4]]).half()
    assert distillation_kl(student, teacher, 0.25) == distillation_kl(student.float(), teacher.float(), 0.25)


@pytest.mark.parametrize('scale', [1.0, 0.0, 1e-20], ids=['usual', 'a map of zeros', 'tiny'])
def test_a_level_may_be_made_from_the_level_before(scale):
    """As in any network: its gradient goes through both, once."""
    torch.manual_seed(0)
    x, teachers = torch.rand(2, 3, 4, 4), (torch.rand(2, 3, 4, 4), scale * torch.rand(2, 3, 2, 2))

    def grad(distance):
        given = x.clone().requires_grad_()
        fine = given.sigmoid()
        (found,) = torch.autograd.grad(distance((fine, scale * F.avg_pool2d(fine, 2))), given, create_graph=True)
        return found, torch.autograd.grad(found.sum(), given)[0]

    together = grad(lambda students: attention_distance(students, teachers))
    alone = grad(lambda students: sum(map(attention_transfer, students, teachers)))
    for ours, expected in list(zip(together, alone))[: 2 if scale else 1]:  # a norm of 0 has no second derivative
        torch.testing.assert_close(ours, expected)
    given = x.clone().requires_grad_()
    fine = given.sigmoid()
    attention_distance((fine, scale * F.avg_pool2d(fine, 2)), teachers).backward()
    torch.testing.assert_close(given.grad, alone[0])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_quality_focal_loss_takes_little_more_memory_than_its_gradient(dtype, monkeypatch):
    """Detectors of thousands of classes have scores of gigabytes. From whole ones it took seven times theirs."""
    monkeypatch.setitem(NUMBERS_AT_ONCE, 'cpu', 2**10)
    logits, target = torch.randn(999, 200).to(dtype).requires_grad_(), torch.rand(999, 200).to(dtype)
    whole = quality_focal_loss(logits, target, reduction='none').sum()
    found = quality_focal_loss(logits, target, reduction='sum')
    torch.testing.assert_close(found, whole)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, whole)]
    torch.testing.assert_close(*gradients)
    peak = peak_bytes(lambda: torch.autograd.grad(quality_focal_loss(logits, target, reduction='sum'), logits))
    assert peak < 1.3 * logits.numel() * logits.element_size()
