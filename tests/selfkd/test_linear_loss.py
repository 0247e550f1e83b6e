"""linear_pskd_loss is pskd_loss of the output layer's logits, which it never has."""

import pytest
import torch
import torch.nn.functional as F

from selfkd.losses import TopK, linear_pskd_loss, pskd_loss
from selfkd.topk import draw_top_k


def case(tokens=45, width=6, vocabulary=401, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((tokens, width), (vocabulary, width), (vocabulary,))
    )
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[3] = -100
    past = TopK(*torch.randn(tokens, vocabulary, generator=generator).softmax(1).topk(5, 1))
    return hidden, weight, bias, labels, past, torch.rand(tokens, generator=generator)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """The 45 tokens are taken 16 at a time, the fewest, in three chunks."""
    monkeypatch.setattr('selfkd.losses.linear.LOGITS_AT_ONCE', {'cpu': 1})


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('shares', ['number', 'each', 'none'])
@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('keep_hard', [True, False])
def test_it_is_the_loss_of_the_logits_with_all_its_gradients(reduction, shares, with_bias, keep_hard):
    hidden, weight, bias, labels, past, alpha = case()
    alpha = {'number': 0.3, 'each': alpha, 'none': 0.0}[shares]
    past = None if shares == 'none' else past
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    bias = bias if with_bias else None
    options = dict(reduction=reduction, keep_hard=keep_hard)
    ours = linear_pskd_loss(hidden, weight, labels, past, alpha, bias=bias, **options)
    expected = pskd_loss(F.linear(hidden, weight, bias), labels, past, alpha, ignore_index=-100, **options)
    torch.testing.assert_close(ours, expected)
    for own, theirs in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * expected, inputs)):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_second_backward_pass_gives_the_same_gradients(dtype):
    hidden, weight, bias, labels, past, alpha = case(dtype=dtype)
    inputs = [hidden, weight, bias]
    loss = linear_pskd_loss(hidden, weight, labels, past, alpha, bias=bias)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # whoever asked may do so
    for again, expected in zip(torch.autograd.grad(loss, inputs), kept):
        assert torch.equal(again, expected)
        assert expected.any()


def test_new_predictions_are_drawn_in_the_same_pass():
    hidden, weight, bias, labels, past, alpha = case()
    uniform = torch.rand(len(hidden), generator=torch.Generator().manual_seed(1))
    loss, drawn = linear_pskd_loss(hidden, weight, labels, past, alpha, bias=bias, draw=(4, uniform))
    expected = draw_top_k(F.linear(hidden, weight, bias), 4, uniform)
    torch.testing.assert_close(drawn.values, expected.values)
    assert torch.equal(drawn.classes, expected.classes)
    assert not drawn.values.requires_grad
    loss.backward()


def test_of_no_tokens_none_are_drawn():
    hidden, weight, bias, labels, past, _ = case()
    none = TopK(past.values[:0], past.classes[:0])
    loss, drawn = linear_pskd_loss(hidden[:0], weight, labels[:0], none, 0.3, bias=bias, draw=(4, torch.rand(0)))
    assert (loss.item(), *drawn.values.shape, *drawn.classes.shape) == (0, 0, 4, 0, 4)


def test_gradients_of_several_scales_at_once():
    hidden, weight, bias, labels, past, alpha = case()
    loss = linear_pskd_loss(hidden, weight, labels, past, alpha, bias=bias)
    (both,) = torch.autograd.grad(loss, hidden, torch.tensor([1.0, 2.0], dtype=loss.dtype), is_grads_batched=True)
    torch.testing.assert_close(both[1], 2 * both[0])
    assert both[0].any()


@pytest.mark.parametrize('keep_hard', [True, False])
def test_its_parts_are_those_of_the_loss_of_the_logits(keep_hard):
    hidden, weight, bias, labels, past, alpha = case()
    options = dict(return_parts=True, keep_hard=keep_hard, reduction='sum')
    _, parts = linear_pskd_loss(hidden, weight, labels, past, alpha, bias=bias, **options)
    _, expected = pskd_loss(F.linear(hidden, weight, bias), labels, past, alpha, ignore_index=-100, **options)
    for part, other in zip(parts, expected):
        torch.testing.assert_close(part, other)
        assert not part.requires_grad


def test_half_precision_gives_gradients_in_its_own_dtype():
    hidden, weight, _, labels, past, alpha = case(dtype=torch.bfloat16)
    loss = linear_pskd_loss(hidden, weight, labels, past, alpha)
    expected = pskd_loss(F.linear(hidden, weight), labels, past, alpha, ignore_index=-100)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, [hidden, weight]) for value in (loss, expected))
    for own, other in zip(ours, theirs):
        assert own.dtype == torch.bfloat16
        assert F.cosine_similarity(own.float().flatten(), other.float().flatten(), dim=0) > 0.999


def test_a_loss_scale_does_not_overflow_float16_gradients():
    hidden, weight, _, labels, past, alpha = case()
    expected = torch.autograd.grad(linear_pskd_loss(hidden, weight, labels, past, alpha), [hidden, weight])
    half = [x.detach().half().requires_grad_() for x in (hidden, weight)]
    try:
        loss = linear_pskd_loss(*half, labels, past, alpha)
    except RuntimeError as error:
        pytest.skip(f'torch {torch.__version__} has no float16 matrix product on the CPU: {error}')
    scale = 2.0**16  # with which a GradScaler begins; float16 ends at 65504
    for found, exact in zip(torch.autograd.grad(loss * scale / 64, half), expected):
        assert F.cosine_similarity(found.float().flatten(), exact.float().flatten(), dim=0) > 0.999
    assert all(
        found.isfinite().all()
        for found in torch.autograd.grad(linear_pskd_loss(*half, labels, past, alpha) * scale, half)
    )


def test_nothing_of_the_size_of_the_logits_is_made():
    hidden, weight, _, labels, past, alpha = case(tokens=512, vocabulary=300)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            outs = out if isinstance(out, (tuple, list)) else [out]
            sizes.extend(x.untyped_storage().nbytes() for x in outs if torch.is_tensor(x))
            return out

    with Sizes():
        linear_pskd_loss(hidden, weight, labels, past, alpha).backward()
    assert 0 < max(sizes) <= 16 * 300 * 8  # of 16 tokens, in float64


def test_refusals_name_the_argument():
    hidden, weight, bias, labels, past, _ = case()
    for call, message in (
        (lambda: linear_pskd_loss(hidden, weight[:, :3], labels, past, 0.3), r'hidden, weight, bias: must be'),
        (lambda: linear_pskd_loss(hidden, weight, labels, past, 0.3, bias=bias[:4]), r'hidden, weight, bias: must be'),
        (lambda: linear_pskd_loss(hidden, weight, labels, None, 0.3), 'past: None is allowed with alpha=0 only'),
        (lambda: linear_pskd_loss(hidden, weight, labels, past, 1.3), r'alpha: must lie in \[0, 1\]'),
        (lambda: linear_pskd_loss(hidden, weight, labels + 400, past, 0.3), 'class ids must lie in'),
        (lambda: linear_pskd_loss(hidden, weight, labels, past, 0.3, reduction='none'), 'reduction: must be one of'),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    loss = linear_pskd_loss(hidden, weight, labels, past, 0.3)
    with pytest.raises(RuntimeError, match='has no second derivative: use pskd_loss'):
        torch.autograd.grad(loss, hidden, create_graph=True)
