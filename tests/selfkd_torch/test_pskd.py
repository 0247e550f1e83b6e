"""PS-KD in a loop of one's own."""

import copy
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from helpers.loops import EPOCHS, LogSoftmaxLoss, Stream, loader_of, network, train
from helpers.processes import in_processes
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    TensorDataset,
)

from selfkd.bank import PredictionBank
from selfkd.losses import pskd_loss
from selfkd.teacher import SnapshotTeacher
from selfkd_torch import FRSKD, PSKD, TokenPSKD


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_it_is_the_papers_loop(digits):
    """The same numbers as the ten lines on the core's functions."""
    model, restated = network(), network()
    pskd = PSKD(loader_of(digits), num_classes=10, alpha=0.8, max_epochs=EPOCHS)
    losses = train(model, pskd.batches(), pskd.loss)

    bank, seen_rows = PredictionBank(60, 10), TensorDataset(torch.arange(60), *digits.tensors)
    optimizer = torch.optim.SGD(restated.parameters(), lr=0.2, momentum=0.9)
    torch.manual_seed(1)
    expected = []
    for epoch in range(EPOCHS):
        for rows, x, y in loader_of(seen_rows):
            logits = restated(x)
            past, seen = bank.read(rows, return_seen=True)
            loss = pskd_loss(logits, y, past, 0.8 * (epoch + 1) / EPOCHS * seen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bank.write(rows, logits.detach().softmax(1))
            expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(pskd.bank.read(torch.arange(60)), bank.read(torch.arange(60)))
    plain = train(network(), loader_of(digits), F.cross_entropy)
    assert losses[:3] == pytest.approx(plain[:3], rel=1e-6)  # the first epoch has no past
    assert abs(losses[-1] - plain[-1]) > 1e-3


@pytest.mark.parametrize('teacher', ['bank', 'snapshot'])
def test_weight_zero_is_plain_training_to_the_last_bit(digits, teacher):
    plain, zero = network(), network()
    expected = train(plain, loader_of(digits), F.cross_entropy)
    how = dict(num_classes=10) if teacher == 'bank' else dict(teacher='snapshot', model=zero)
    pskd = PSKD(loader_of(digits), alpha=0.0, max_epochs=EPOCHS, **how)
    assert train(zero, pskd.batches(), pskd.loss) == expected
    assert same(plain, zero)


def test_the_snapshot_teaches_in_the_students_mode(digits):
    """Restated: the model of the end of the last epoch, with dropout and its own noise, on the same inputs."""
    model, restated = network(), network()
    pskd = PSKD(loader_of(Stream(digits), shuffle=False), alpha=0.8, max_epochs=EPOCHS, teacher='snapshot', model=model)
    losses = train(model, pskd.batches(), pskd.loss)

    teacher, optimizer = SnapshotTeacher(restated), torch.optim.SGD(restated.parameters(), lr=0.2, momentum=0.9)
    torch.manual_seed(1)
    expected, step = [], 0
    for epoch in range(EPOCHS):
        if epoch:
            teacher.update(restated)
        for x, y in loader_of(Stream(digits), shuffle=False):
            teacher.begin_step(step)
            past = teacher(x).softmax(1) if epoch else None
            loss = pskd_loss(restated(x), y, past, 0.8 * (epoch + 1) / EPOCHS if epoch else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
            step += 1
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(restated.state_dict(), model.state_dict())


@pytest.mark.parametrize('teacher', ['bank', 'snapshot', 'ema'])
def test_resume_is_exact(digits, teacher):
    def make(model):
        how = dict(num_classes=10) if teacher == 'bank' else dict(teacher=teacher, model=model)
        return PSKD(loader_of(digits, shuffle=False), alpha=0.8, max_epochs=4, **how)

    straight = network()
    pskd = make(straight)
    losses = train(straight, pskd.batches(), pskd.loss, epochs=4)

    model = network()
    pskd, saved = make(model), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    torch.manual_seed(1)

    def steps(pskd, model, optimizer, epochs):
        for _ in range(epochs):
            for x, y in pskd.batches():
                loss = pskd.loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield loss.item()

    first = list(steps(pskd, model, optimizer, 2))
    saved = copy.deepcopy(
        dict(m=model.state_dict(), o=optimizer.state_dict(), p=pskd.state_dict(), r=torch.get_rng_state())
    )
    resumed = network(seed=5)
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.2, momentum=0.9)
    resumed.load_state_dict(saved['m'])
    optimizer.load_state_dict(saved['o'])
    pskd = make(resumed)
    pskd.load_state_dict(saved['p'])
    torch.set_rng_state(saved['r'])
    assert first + list(steps(pskd, resumed, optimizer, 2)) == losses
    assert same(resumed, straight)
    other = dict(teacher='snapshot', model=resumed) if teacher == 'bank' else dict(teacher='bank')
    with pytest.raises(ValueError, match=f"PSKD: the state is of teacher='{teacher}'"):
        PSKD(loader_of(digits), max_epochs=4, **other).load_state_dict(saved['p'])


def test_the_number_of_classes_is_seen_at_the_first_loss_or_in_the_state(digits):
    given, found = (PSKD(loader_of(digits), classes, alpha=0.8, max_epochs=EPOCHS) for classes in (10, None))
    assert train(network(), found.batches(), found.loss) == train(network(), given.batches(), given.loss)
    again = PSKD(loader_of(digits), max_epochs=EPOCHS)
    assert 'bank' not in again.state_dict()
    again.load_state_dict(found.state_dict())
    assert again.state_dict().keys() == found.state_dict().keys()
    assert torch.equal(again.state_dict()['bank']['values'], given.bank.read(torch.arange(60)))


def test_an_epoch_left_by_break_is_over_in_a_resumed_run_too(digits):
    def shares(pskd, model, epochs):
        for _ in range(epochs):
            for x, y in pskd.batches():
                pskd.loss(model(x), y)
                yield pskd.current_alpha
                break

    model = network()
    pskd = PSKD(loader_of(digits), 10, alpha=0.8, max_epochs=4)
    assert list(shares(pskd, model, 2)) == pytest.approx([0.2, 0.4])
    resumed = PSKD(loader_of(digits), 10, alpha=0.8, max_epochs=4)
    resumed.load_state_dict(pskd.state_dict())
    assert list(shares(resumed, model, 2)) == pytest.approx([0.6, 0.8])


def test_the_entropy_is_of_what_has_a_label(digits):
    model = nn.Linear(64, 10)
    pskd = PSKD(loader_of(digits, shuffle=False), max_epochs=2, teacher='snapshot', model=model)
    for _ in range(2):
        for x, y in pskd.batches():
            x, y = torch.cat([torch.zeros_like(x[:1]), 1e4 * x[1:]]), y.clone()  # unsure of the first alone
            y[1:] = -100
            pskd.loss(model(x), y)
    assert float(pskd.logs['pskd_entropy']) == pytest.approx(math.log(10), abs=0.1)


def two_minds(rank):
    """Mixed labels in one process only."""
    torch.distributed.init_process_group('gloo')
    model = network()
    loader = DataLoader(TensorDataset(torch.randn(8, 64), torch.arange(8)), batch_size=4)
    pskd = PSKD(loader, 10, max_epochs=2, model=model)
    for _ in range(2):
        for x, y in pskd.batches():
            pskd.loss(model(x), F.one_hot(y, 10).float() if rank else y)
    return pskd.kind


def test_all_processes_take_one_teacher(tmp_path):
    assert in_processes(tmp_path, two_minds, 2) == ['snapshot', 'snapshot']


def test_the_average_moves_with_each_batch(digits):
    model, loader = network(), loader_of(digits, shuffle=False)
    pskd = PSKD(loader, max_epochs=2, teacher='ema', ema_decay=0.5, model=model)
    average, weights = model[0].weight.detach().clone(), []
    train(model, pskd.batches(), pskd.loss, 1, after_step=lambda: weights.append(model[0].weight.detach().clone()))
    for t, weight in enumerate(weights, 1):
        average = average.lerp(weight, 1 - min(0.5, (1 + t) / (10 + t)))
    torch.testing.assert_close(pskd.past.model[0].weight, average)


def mixup(x, y):
    target = F.one_hot(y, 10).float()
    return 0.7 * x + 0.3 * x.flip(0), 0.7 * target + 0.3 * target.flip(0)


@pytest.mark.parametrize('how', ['loss', 'tap'])
def test_auto_takes_the_bank_or_the_snapshot(digits, caplog, how):
    """The first loss shows whether a prediction belongs to a sample; a state decides for the resumed run."""
    caplog.set_level('INFO')
    for kind, why, data, change in (
        ('bank', 'each sample keeps its identity', digits, lambda x, y: (x, y)),
        ('snapshot', 'samples may be mixed', digits, mixup),
        ('snapshot', 'the batch has 20 samples of 10 classes', digits, lambda x, y: (x.repeat(2, 1), y.repeat(2))),
        ('snapshot', 'IterableDataset, whose samples have no index', Stream(digits), lambda x, y: (x, y)),
    ):
        caplog.clear()
        losses = {}
        for teacher in ('auto', kind):
            model = network()
            loader = loader_of(data, shuffle=False)
            given = {} if teacher == 'bank' else dict(model=model)
            pskd = PSKD(
                loader, 10, max_epochs=2, teacher=teacher, **given, **(dict(top_k=3) if teacher == 'auto' else {})
            )
            if teacher == kind == 'bank':
                pskd = PSKD(loader, 10, max_epochs=2, teacher=teacher, top_k=3)
            loss_of = pskd.loss if how == 'loss' else F.cross_entropy
            with pskd.tap(check=False) if how == 'tap' else torch.enable_grad():
                losses[teacher] = []
                for _ in range(2):
                    for batch in pskd.batches():
                        x, y = change(*batch)
                        losses[teacher].append(loss_of(model(x), y).item())
            assert pskd.kind == kind
        assert losses['auto'] == losses[kind]
        assert f"teacher='auto' takes the {kind}" in caplog.text
        assert why in caplog.text
        assert ('top_k: no effect' in caplog.text) == (kind == 'snapshot')
        again = PSKD(loader_of(digits), max_epochs=2, model=network())
        again.load_state_dict(pskd.state_dict())
        assert again.kind == kind
    pskd = PSKD(loader_of(digits), max_epochs=2)  # nothing to copy
    with pytest.raises(ValueError, match="samples may be mixed .*: use teacher='snapshot' with model="):
        train(network(), pskd.batches(), lambda z, y: pskd.loss(z, F.one_hot(y, 10).float()))


@pytest.mark.parametrize('teacher', ['snapshot', 'ema'])
def test_an_interval_in_place_of_epochs(digits, teacher):
    """In a training of one epoch: alpha grows with what was done when the period began."""
    model, alphas, plain = network(), [], network()
    pskd = PSKD(loader_of(digits, batch_size=10), alpha=0.8, max_epochs=1, teacher=teacher, interval=2, model=model)
    losses = train(model, pskd.batches(), pskd.loss, 1, after_step=lambda: alphas.append(pskd.current_alpha))
    assert alphas == pytest.approx([0, 0, 0.8 / 3, 0.8 / 3, 1.6 / 3, 1.6 / 3])
    expected = train(plain, loader_of(digits, batch_size=10), F.cross_entropy, 1)
    assert losses[:2] == expected[:2]
    assert losses[2] != expected[2]
    with pytest.raises(ValueError, match='the first 6 steps .interval=. have no past'):
        PSKD(loader_of(digits, batch_size=10), max_epochs=1, interval=6, model=model)


@pytest.mark.parametrize('keep_hard', [False, True])
@pytest.mark.parametrize('teacher', ['bank', 'snapshot'])
def test_the_logs_are_the_parts_of_the_loss(digits, teacher, keep_hard):
    for criterion in (None, LogSoftmaxLoss()):
        model = network()
        given = dict(num_classes=10) if teacher == 'bank' else dict(model=model)
        given.update(alpha=0.8, teacher=teacher, keep_hard=keep_hard)
        pskd = PSKD(loader_of(digits, shuffle=False), max_epochs=2, **given)
        for epoch in range(2):
            for x, y in pskd.batches():
                logits = model(x)
                with pskd.tap(criterion, check=False):
                    loss = criterion(logits, y) if criterion else F.cross_entropy(logits, y, label_smoothing=0.1)
                logs = {name: float(value) for name, value in pskd.logs.items()}
                assert logs['pskd_alpha'] == pytest.approx(0.4 * (epoch + 1))
                assert logs['pskd_hard'] + logs['pskd_soft'] == pytest.approx(loss.item(), rel=1e-5)
                assert (logs['pskd_entropy'] > 0) == (logs['pskd_soft'] > 0) == (epoch == 1)
        plain = LogSoftmaxLoss()(logits, y) if criterion else F.cross_entropy(logits, y, label_smoothing=0.1)
        assert logs['pskd_hard'] == pytest.approx(plain.item() * (1 if keep_hard else 0.2), rel=1e-4)


def test_old_names_of_options(digits):
    for kind in (PSKD, TokenPSKD):
        for old, value in dict(dtype=torch.float16, device='cpu').items():
            with pytest.warns(DeprecationWarning, match=f'{kind.__name__}: {old} is now called bank_{old}'):
                assert kind(loader_of(digits), max_epochs=2, **{old: value})._settings[f'bank_{old}'] == value


def test_a_snapshot_saved_within_an_epoch_is_the_one_that_taught(digits):
    model = network()
    pskd = PSKD(loader_of(digits), max_epochs=4, teacher='snapshot', model=model)
    train(model, pskd.batches(), pskd.loss, epochs=1)
    for x, y in pskd.batches():
        pskd.loss(model(x), y)
        before = model.state_dict()['0.weight'].clone()
        with torch.no_grad():
            model[0].weight.add_(1)
        state = pskd.state_dict()
        break
    again = PSKD(loader_of(digits), max_epochs=4, teacher='snapshot', model=model)
    again.load_state_dict(state)
    for x, y in again.batches():
        again.loss(model(x), y)
        assert again.current_alpha == pskd.current_alpha
        assert torch.equal(again.past.model.state_dict()['0.weight'], before)
        break


def distributed(data, folder, rank):
    torch.distributed.init_process_group('gloo')
    model = nn.parallel.DistributedDataParallel(network())
    sampler = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, batch_size=10, sampler=sampler)
    pskd = PSKD(loader, num_classes=10, max_epochs=EPOCHS)
    snapshot = PSKD(loader, max_epochs=EPOCHS, teacher='snapshot', model=model)
    frskd = FRSKD(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2)), ['0', '1'], 10, example=torch.zeros(1, 1, 8, 8)
    )
    train(model, pskd.batches(), pskd.loss)
    train(model, snapshot.batches(), snapshot.loss)
    return dict(
        bank=pskd.bank.state_dict(),
        weights=model.module.state_dict(),
        self_teacher=frskd.state_dict(),
        alpha=pskd.current_alpha,
    )


@pytest.mark.parametrize('processes', [2, 4])
def test_several_processes_hold_one_bank(digits, tmp_path, processes):
    ranks = in_processes(tmp_path, lambda rank: distributed(digits, tmp_path, rank), processes)
    for rank in ranks[1:]:
        for part in ('bank', 'self_teacher'):
            for name, value in ranks[0][part].items():
                same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
                assert same(value, rank[part][name]), name
        assert torch.equal(rank['weights']['0.weight'], ranks[0]['weights']['0.weight'])
    assert bool(ranks[0]['bank']['seen'].all())


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(label_smoothing=0.1),
        dict(weight=torch.linspace(0.5, 2, 10)),
        dict(weight=torch.linspace(0.5, 2, 10), label_smoothing=0.1, reduction='sum'),
        dict(ignore_index=3, reduction='none'),
        dict(ignore_index=3, weight=torch.linspace(0.5, 2, 10)),
    ],
    ids=str,
)
@pytest.mark.parametrize('shape', [(), (4, 4)], ids=['classes', 'pixels'])
def test_the_loss_takes_what_cross_entropy_takes(options, shape):
    """(1 - alpha) of torch's own loss and alpha of the past's, which is torch's own loss of these probabilities."""
    data = TensorDataset(torch.randn(6, 5, *shape), torch.randint(10, (6, *shape)))
    data.tensors[1].view(-1)[0] = 3
    torch.manual_seed(0)
    model = nn.Conv2d(5, 10, 1) if shape else nn.Linear(5, 10)
    pskd = PSKD(DataLoader(data, batch_size=6), alpha=0.8, max_epochs=2, teacher='snapshot', model=model)
    for _ in range(2):
        for x, y in pskd.batches():
            logits = model(x)
            loss = pskd.loss(logits, y, **options)
    past, weight = logits.detach().softmax(1), options.get('weight', torch.ones(10))
    hard = F.cross_entropy(logits, y, **{**options, 'reduction': 'none'})
    factors = weight.view(-1, *[1] * len(shape))
    valid = y != options.get('ignore_index', -100)
    soft = -(factors * past * logits.log_softmax(1)).sum(1) * valid
    expected = 0.2 * hard + 0.8 * soft
    if options.get('reduction', 'mean') == 'mean':
        expected = expected.sum() / (weight[y] * valid).sum()
    torch.testing.assert_close(loss, expected.sum() if options.get('reduction') == 'sum' else expected)


def test_mixup_accumulation_autocast_average_and_compiled_models(digits):
    """A snapshot beside all of these at once."""
    model = network()
    compiled = torch.compile(model, backend='eager')
    average = torch.optim.swa_utils.AveragedModel(model)
    pskd = PSKD(loader_of(digits, batch_size=30), alpha=0.8, max_epochs=EPOCHS, teacher='snapshot', model=compiled)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    torch.manual_seed(1)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(pskd.batches()):
            mixed, target = 0.7 * x + 0.3 * x.flip(0), 0.7 * F.one_hot(y, 10) + 0.3 * F.one_hot(y.flip(0), 10)
            with torch.autocast('cpu', torch.bfloat16):
                loss = pskd.loss(compiled(mixed), target) / 2
            loss.backward()
            losses.append(loss.item())
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(model)
                copy.deepcopy(model)
    assert pskd.current_alpha == pytest.approx(0.8)
    assert losses[-1] < losses[0]
    assert not pskd._calls._calls
    assert not {*model._forward_pre_hooks, *compiled._forward_pre_hooks, *compiled._forward_hooks}


def one_ahead(batches):
    """A prefetcher: the next batch is taken before one is handed out."""
    batches = iter(batches)
    batch = next(batches)
    for following in batches:
        yield batch
        batch = following
    yield batch


def test_what_cannot_work_is_refused(digits):
    loader, model = loader_of(digits), network()
    for error, message, make in (
        (ValueError, "IterableDataset, whose samples have no index: use teacher='snapshot' with model=",
         lambda: PSKD(DataLoader(Stream(digits)), num_classes=10, max_epochs=3)),
        (ValueError, 'the loader is a list, whose batches do not come from', lambda: PSKD([1], max_epochs=3)),
        (ValueError, 'the first of the epochs has no past', lambda: PSKD(loader, 10, max_epochs=1)),
        (ValueError, 'the loader is a Prefetcher, whose batches do not come from',
         lambda: PSKD(type('Prefetcher', (), {'loader': loader, '__iter__': one_ahead})(), 10, max_epochs=3)),
        (ValueError, r'alpha must lie in \[0, 1\], got 1.5', lambda: PSKD(loader, 10, alpha=1.5, max_epochs=3)),
        (ValueError, "teacher='snapshot' copies the model", lambda: PSKD(loader, max_epochs=3, teacher='snapshot')),
        (ValueError, "with teacher='bank' model would do nothing",
         lambda: PSKD(loader, 10, max_epochs=3, teacher='bank', model=model)),
        (ValueError, 'interval must be a positive number of steps', lambda: PSKD(loader, max_epochs=3, interval=0)),
        (ValueError, 'bank_momentum: must lie in', lambda: PSKD(loader, max_epochs=3, bank_momentum=1.0)),
        (ValueError, "with teacher='snapshot' top_k would do nothing",
         lambda: PSKD(loader, max_epochs=3, teacher='snapshot', model=model, top_k=2)),
        (ValueError, 'have a PSKD already',
         lambda: PSKD(PSKD(loader, 10, max_epochs=3).batches(), 10, max_epochs=3)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            make()
    other = PSKD(loader, max_epochs=2, teacher='snapshot', model=network())
    with pytest.raises(RuntimeError, match='the Sequential given as model= was not called before the loss'):
        train(model, other.batches(), other.loss, epochs=2)
    pskd = PSKD(loader, num_classes=10, max_epochs=2)
    with pytest.raises(RuntimeError, match=r'in a loop over pskd.batches\(\)'):
        pskd.loss(torch.randn(2, 10), torch.tensor([0, 1]))
    logits, target = torch.randn(20, 10), torch.zeros(20, dtype=torch.long)
    for error, message, arguments in (
        (ValueError, r'wants logits \(20, 10\), got \(5, 10\)', (logits[:5], target[:5])),
        (ValueError, 'samples may be mixed', (logits, logits.softmax(1))),
    ):
        for _ in pskd.batches():
            with pytest.raises(error, match=message):
                pskd.loss(*arguments)
            break
    for options in (dict(num_classes=10), dict(teacher='snapshot', model=model)):
        pskd = PSKD(loader, max_epochs=2, **options)
        with pytest.raises(RuntimeError, match=r'A prefetcher .* goes inside: PSKD\(prefetcher, teacher='):
            train(model, one_ahead(pskd.batches()), pskd.loss, epochs=1)
    pskd = PSKD(loader, num_classes=10, max_epochs=2)
    for _ in pskd.batches():
        pskd.loss(logits, target)
        with pytest.raises(RuntimeError, match='a second loss in one batch'):
            pskd.loss(logits, target)
    for _ in pskd.batches():
        pskd.loss(logits, target)
    with pytest.raises(ValueError, match='epoch 3 of max_epochs=2'):
        next(iter(pskd.batches()))


@pytest.mark.parametrize('options', [{}, dict(top_k=2)])
def test_a_compiled_step_is_compiled_once_whatever_alpha_is(options):
    """The network, the cross-entropy of the first epoch, and the mixed loss of all others; look-ups stay outside."""
    images, labels = torch.randn(8, 4), torch.arange(8) % 3
    losses, graphs = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        counter, model = CompileCounter(), nn.Linear(4, 3)
        pskd = PSKD(DataLoader(TensorDataset(images, labels), batch_size=4), max_epochs=4, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x, y, pskd=pskd, model=model):
            return pskd.loss(model(x), y)

        run = torch.compile(step, backend=counter) if compiled else step
        for _ in range(4):
            for x, y in pskd.batches():
                loss = run(x, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            graphs.append(counter.frame_count)
    assert losses[8:] == pytest.approx(losses[:8], rel=1e-5)
    assert graphs[4] < graphs[5] == graphs[6] == graphs[7] <= 4
