"""The self-teacher against the straightforward arrangement of the same layers in tests/helpers/plain_pyramid.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.plain_pyramid import PlainPyramid
from simulated_gpu import SimulatedGPU
from torch import nn

from selfkd.pyramid import BiFPN, SelfTeacherPyramid, _pool, _relu, _shares, _weighted_sum, dry_run


def pair(channels, sizes, batch=3, depth=2):
    torch.manual_seed(0)
    fast = SelfTeacherPyramid(channels, 5, depth=depth)
    for p in fast.parameters():  # also the fusion weights and batch norms away from where they start
        nn.init.uniform_(p, -0.5, 1.0) if p.dim() == 1 else None
    plain = PlainPyramid(channels, 5, depth=depth)
    plain.load_state_dict(plain.state_of(fast))
    feats = [torch.randn(batch, c, *s) for c, s in zip(channels, sizes)]
    return fast, plain, feats


@pytest.mark.parametrize(
    ('channels', 'sizes'),
    [
        ([4, 8, 6, 10], [(16, 16), (8, 8), (4, 4), (2, 2)]),
        ([4, 8, 6], [(14, 14), (7, 7), (4, 4)]),  # 7 to 4: not an exact half
        ([3, 5], [(9, 6), (5, 3)]),
        ([8, 8], [(2, 2), (1, 1)]),
    ],
)
def test_equals_the_straightforward_arrangement(channels, sizes):
    """Outputs, gradients and running statistics after two training steps, to 1e-5, and the evaluation after them."""
    fast, plain, feats = pair(channels, sizes)
    for _ in range(2):
        results = []
        for net in (fast, plain):
            net.zero_grad()
            inputs = [f.clone().requires_grad_() for f in feats]
            maps, logits = net(inputs)
            (logits.sin().sum() + sum(m.sin().mean() for m in maps)).backward()
            results.append((maps, logits, [f.grad for f in inputs]))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    expected = plain.state_of(fast)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(expected[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f'{n}: {m}')
    grads = copy.deepcopy(fast)
    for target, source in zip(grads.parameters(), fast.parameters()):
        target.data = source.grad
    expected = plain.state_of(grads)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(expected[name], p.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f'{n}: {m}')
    fast.eval(), plain.eval()
    for a, b in zip(fast(feats), plain(feats)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_parameters_for_resnet18():
    """6.4 M in training for levels 64/128/256/512 and 100 classes."""
    assert sum(p.numel() for p in SelfTeacherPyramid([64, 128, 256, 512], 100).parameters()) == 6_375_794


def test_second_pass_and_preact():
    pyramid = SelfTeacherPyramid([4, 8, 8], 5, width=1, depth=1, repeats=2).eval()
    feats = [torch.randn(2, c, s, s) for c, s in ((4, 8), (8, 4), (8, 2))]
    maps, logits = pyramid(feats)
    raw, same = pyramid(feats, preact=True)
    assert min(m.min() for m in raw) < 0
    torch.testing.assert_close(logits, same)
    for a, b in zip(maps, raw):
        torch.testing.assert_close(a, b.relu())


@pytest.mark.parametrize(('size', 'smaller'), [((7, 9), (5, 3)), ((13, 8), (3, 1)), ((6, 6), (3, 2)), ((5, 5), (4, 4))])
def test_pooling_to_a_size_is_torchs_adaptive_one_and_deterministic(size, smaller):
    maps, grads = torch.randn(2, 3, *size), []
    expected = F.adaptive_max_pool2d(x := maps.clone().requires_grad_(), smaller)
    grads.append(torch.autograd.grad(expected.pow(2).sum(), x)[0])
    with SimulatedGPU() as gpu:
        y = _pool(x := gpu.put(maps).requires_grad_(), smaller)
        grads.append(torch.autograd.grad(y.pow(2).sum(), x)[0].values)
        assert not gpu.nondeterministic
        assert not gpu.waits
    assert torch.equal(y.values, expected)
    torch.testing.assert_close(*grads)


def test_any_sizes_that_do_not_grow():
    pyramid = SelfTeacherPyramid([4, 4, 4, 4], 5)
    maps, _ = pyramid([torch.randn(2, 4, *s) for s in ((13, 10), (13, 10), (5, 4), (1, 1))])
    assert [tuple(m.shape[2:]) for m in maps] == [(13, 10), (13, 10), (5, 4), (1, 1)]


def test_every_parameter_gets_a_gradient():
    """DDP stops at parameters without one."""
    pyramid = SelfTeacherPyramid([4, 8, 8], 5)
    _, logits = pyramid([torch.randn(2, c, s, s) for c, s in ((4, 8), (8, 4), (8, 2))])
    logits.sum().backward()
    assert all(p.grad is not None for p in pyramid.parameters())


@pytest.mark.parametrize('repeats', [1, 2])
def test_a_pyramid_whose_last_pass_goes_top_down_only(repeats):
    """The finest map and its gradients are those of the whole pyramid; it trains everything that makes the others."""
    torch.manual_seed(0)
    whole = BiFPN([4, 8, 8], [6, 6, 6], depth=1, repeats=repeats)
    down = BiFPN([4, 8, 8], [6, 6, 6], depth=1, repeats=repeats, last_top_down=True)
    first = len(whole.layers) == 1
    state = {}
    for name, value in whole.state_dict().items():
        if first and name.startswith(('layers.0.laterals.1', 'layers.0.laterals.2')) and value.dim():
            value = value[:6]  # L_i without M_i
        state[name] = value
    down.load_state_dict({name: state[name] for name in down.state_dict()})
    feats = [torch.randn(2, c, s, s) for c, s in ((4, 8), (8, 4), (8, 2))]
    results = []
    for pyramid in (whole, down):
        inputs = [f.clone().requires_grad_() for f in feats]
        maps = pyramid(inputs)
        maps[0].sin().sum().backward()
        results.append((maps, [f.grad for f in inputs]))
    torch.testing.assert_close(results[1][0][0], results[0][0][0])
    torch.testing.assert_close(results[1][1], results[0][1])
    assert [tuple(m.shape) for m in results[1][0]] == [(2, 6, 8, 8), (2, 6, 4, 4), (2, 6, 2, 2)]
    for name, p in down.named_parameters():
        assert p.grad is not None, name
    for a, b in zip(down.eval()(feats), down(feats, preact=True)):
        assert torch.equal(a, b.relu())


def test_sums_of_maps_have_first_and_second_derivatives():
    weights = [torch.rand(n, dtype=torch.float64, requires_grad=True) for n in (2, 3)]
    maps = [torch.randn(2, 2, n, n, dtype=torch.float64, requires_grad=True) for n in (4, 4, 2)]

    def sums(two, three, *maps):
        shares = _shares([two, three])
        return _weighted_sum(shares[0], *maps[1:]), _weighted_sum(shares[1], *maps)

    for total, w, terms in zip(sums(*weights, *maps), weights, (maps[1:], maps)):
        terms = [*terms[:-1], F.interpolate(terms[-1], scale_factor=2)]
        torch.testing.assert_close(total, sum(x * m for x, m in zip(w / (w.sum() + 1e-6), terms)))
    assert torch.autograd.gradcheck(sums, (*weights, *maps))
    assert torch.autograd.gradgradcheck(sums, (*weights, *maps))


def test_maps_that_a_relu_made_are_taken_as_they_are():
    pyramid, x = SelfTeacherPyramid([4, 8], 5), [torch.randn(2, c, s, s).requires_grad_() for c, s in ((4, 8), (8, 4))]
    maps = [F.relu(feat) for feat in x]
    assert _relu(maps[0]) is maps[0]
    grads = [torch.autograd.grad(pyramid(feats)[1].sin().sum(), x) for feats in (x, maps)]
    torch.testing.assert_close(*grads)


def test_autocast():
    """In bfloat16 the same to bfloat16's precision, gradients included."""
    fast, _, feats = pair([4, 8], [(8, 8), (4, 4)])
    _, expected = fast(feats)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        maps, logits = fast(feats)
    logits.float().sum().backward()
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in fast.parameters())


def test_torch_func_and_compile():
    """Gradients by autograd, by torch.func, and by torch.compile without a graph break, are the same."""
    torch.manual_seed(0)
    pyramid = SelfTeacherPyramid([4, 8], 5, depth=1)
    feats = [torch.randn(2, c, s, s) for c, s in ((4, 8), (8, 4))]
    for module in pyramid.modules():  # whose running statistics torch.func cannot write into
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    parameters = {name: p.detach() for name, p in pyramid.named_parameters()}

    def loss(parameters, feats):
        maps, logits = torch.func.functional_call(pyramid, parameters, (feats,))
        return logits.sin().sum() + sum(m.sin().mean() for m in maps)

    loss(dict(pyramid.named_parameters()), feats).backward()
    expected = {name: p.grad for name, p in pyramid.named_parameters()}
    torch.testing.assert_close(torch.func.grad(loss)(parameters, feats), expected, rtol=1e-4, atol=1e-5)
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, [torch.stack([f, 2 * f]) for f in feats])
    torch.testing.assert_close({name: g[0] for name, g in each.items()}, expected, rtol=1e-4, atol=1e-5)
    pyramid.zero_grad()
    maps, logits = torch.compile(pyramid, fullgraph=True, backend='aot_eager')(feats)
    (logits.sin().sum() + sum(m.sin().mean() for m in maps)).backward()
    compiled = {name: p.grad for name, p in pyramid.named_parameters()}
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: SelfTeacherPyramid([4], 5), 'in_channels: must name the channels of at least 2 levels'),
        (lambda: SelfTeacherPyramid([4, 4], 5, depth=0), 'depth: must be at least 1, got 0'),
        (
            lambda: SelfTeacherPyramid([4, 8], 5)([torch.zeros(1, 4, 4, 4)]),
            r'channels must be in_channels=\[4, 8\]',
        ),
        (
            lambda: SelfTeacherPyramid([4, 4], 5)([torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 4, 4)]),
            'fine to coarse, got sizes',
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_dry_run_leaves_the_model_and_the_random_state_as_they_were():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    state = torch.get_rng_state()

    def fail():
        with dry_run(model):
            assert not model[0].training
            torch.rand(3)
            raise ValueError('of the network')

    with pytest.raises(ValueError, match='of the network'):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), state)
