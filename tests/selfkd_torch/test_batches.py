"""Which sample is which, what an epoch is, and what the loader does, whatever a loop does with ``batches()``."""

import logging

import pytest
import torch
import torch.nn.functional as F
from helpers.processes import in_processes
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from selfkd_torch import CSKD, PSKD, Batches

N, CLASSES = 24, 4
X, Y = torch.arange(float(N))[:, None].repeat(1, 3), torch.arange(N) % CLASSES
DATA = TensorDataset(X, Y)
NOT_THEIRS = 'the samples of a batch are not those that the sampler chose'


def loader_of(data=DATA, **options):
    return DataLoader(data, **{'batch_size': 6, **options})


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, CLASSES))


def bank_of(loader, **options):
    return PSKD(loader, num_classes=CLASSES, **{'alpha': 0.8, 'max_epochs': 4, **options})


def snapshot_of(loader, model, **options):
    return PSKD(loader, teacher='snapshot', model=model, **{'alpha': 0.8, 'max_epochs': 4, **options})


def epoch_of(method, model=None, change=lambda x, y: (x, y), steps=None):
    """A loop over the batches, as far as ``steps``."""
    model = model or network()
    for step, batch in enumerate(method.batches()):
        x, y = change(*batch)
        method.loss(model(x), y).backward()
        if step + 1 == steps:
            break


def several_epochs(method, epochs=2, **options):
    for _ in range(epochs):
        epoch_of(method, **options)


def pass_over(batches, steps=None):
    """A loop that trains on nothing."""
    for step, _ in enumerate(batches):
        if step + 1 == steps:
            break


def by_length(samples):
    """As for pack_padded_sequence: the longest first."""
    return default_collate(sorted(samples, key=lambda sample: -sample[0][0]))


def replacing(samples):
    return default_collate([*samples[:-1], samples[0]])


class Retrying(Dataset):
    """Gives another sample in place of one that cannot be read."""

    targets = Y.tolist()

    def __len__(self):
        return N

    def __getitem__(self, index):
        return DATA[index if index != 5 else index + 1]


def shuffled(x, y):
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    return x[order], y[order]


@pytest.mark.parametrize(
    ('data', 'options', 'change'),
    [
        (DATA, dict(collate_fn=by_length), None),
        (DATA, dict(collate_fn=replacing), None),
        (DATA, {}, shuffled),
        (Retrying(), {}, None),
    ],
    ids=['collate that sorts', 'collate that replaces', 'randperm in the loop', 'data set that retries'],
)
def test_samples_in_other_places_than_their_rows_are_refused(data, options, change):
    change = change or (lambda x, y: (x, y))
    loader = loader_of(data, shuffle=True, generator=torch.Generator().manual_seed(0), **options)
    cskd = CSKD(loader, network(), labels=Y)
    if not isinstance(data, Retrying):  # a bank sees a retry only where its neighbours have other labels
        pskd = bank_of(loader)
        with pytest.raises(ValueError, match=NOT_THEIRS):
            several_epochs(pskd, change=change)
    with pytest.raises(ValueError, match=NOT_THEIRS):
        epoch_of(cskd, cskd.model, change=change)


def test_partners_in_other_places_are_refused():
    """The first half of each batch is as it was drawn, the second is sorted."""
    calls = []

    def collate(samples):
        calls.append(len(samples))
        return (default_collate if len(calls) % 2 else by_length)(samples)

    cskd = CSKD(loader_of(shuffle=True, collate_fn=collate), network(), labels=Y)
    with pytest.raises(ValueError, match=NOT_THEIRS):
        next(iter(cskd.batches()))


def test_a_subset_that_is_redrawn_and_a_shuffled_data_set_are_refused():
    subset = Subset(DATA, list(range(12)))
    pskd = bank_of(loader_of(subset))
    epoch_of(pskd)
    subset.indices = list(range(11, 23))
    with pytest.raises(ValueError, match=NOT_THEIRS):
        epoch_of(pskd)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    resumed = bank_of(loader_of(TensorDataset(X[order], Y[order])))
    straight = bank_of(loader_of())
    epoch_of(straight)
    resumed.load_state_dict(straight.state_dict())
    with pytest.raises(ValueError, match='or was training resumed with another data set'):
        epoch_of(resumed)


def test_one_iterator_at_a_time():
    pskd = bank_of(loader_of())
    with pytest.raises(RuntimeError, match='an iterator over them is not finished yet'):
        list(zip(pskd.batches(), pskd.batches()))
    held = iter(pskd.batches())
    next(held)
    with pytest.raises(RuntimeError, match='an iterator over them is not finished yet'):
        epoch_of(pskd)
    del held
    epoch_of(pskd)


def test_what_changes_on_the_loader_is_followed():
    loader = loader_of()
    pskd = bank_of(loader)
    first = next(iter(pskd.batches()))
    loader.collate_fn = lambda samples: [tensor + 1 for tensor in default_collate(samples)]
    assert torch.equal(next(iter(pskd.batches()))[0], first[0] + 1)
    pskd.batches().lend().worker_init_fn = set_noise  # what a toolkit sets on what it was lent is the loader's
    assert loader.worker_init_fn is set_noise
    loader.num_workers, loader.prefetch_factor = 1, 2
    assert torch.equal(next(iter(pskd.batches()))[0], first[0] + 1)


class Noisy(Dataset):
    noise = 0

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index] + self.noise, Y[index]


def set_noise(worker):
    get_worker_info().dataset.noise = 5 + worker


def test_a_worker_init_fn_sets_attributes_of_the_users_data_set():
    data = Noisy()
    pskd = bank_of(loader_of(data, num_workers=2, worker_init_fn=set_noise))
    plain = [x for x, _ in loader_of(data, num_workers=2, worker_init_fn=set_noise)]
    for (x, y), expected in zip(pskd.batches(), plain):
        assert torch.equal(x, expected)
        pskd.loss(torch.randn(6, CLASSES), y)
    assert pskd.batches().lend().dataset is data


def test_a_batch_that_fails_takes_its_rows_along():
    class Broken(Noisy):
        def __getitem__(self, index):
            if index == 8:
                raise OSError('unreadable')
            return super().__getitem__(index)

    batches = Batches(loader_of(Broken()))
    batches.number('PSKD', 'use another loader')
    running, seen = iter(batches.lend()), []
    while True:
        try:
            x, _ = next(running)
        except OSError:
            continue
        except StopIteration:
            break
        rows, _ = batches.noted.popleft()
        assert torch.equal(x[:, 0].long(), rows)
        seen += rows.tolist()
    assert seen == [*range(6), *range(12, N)]


@pytest.mark.parametrize('drawn', [(3, 224), 'key'])
def test_samplers_that_draw_something_else_than_numbers_are_named(drawn):
    data = {drawn: DATA[0]}
    with pytest.raises(ValueError, match=r'the sampler draws \[.* for a batch, which are not the numbers of samples'):
        next(iter(bank_of(DataLoader(data, sampler=[drawn])).batches()))


def test_a_look_at_a_batch_is_no_epoch():
    model, alphas = network(), []
    for pskd in (bank_of(loader_of()), snapshot_of(loader_of(), model)):
        next(iter(pskd.batches()))
        for _ in range(4):
            for x, y in pskd.batches():
                pskd.loss(model(x), y)
            next(iter(pskd.batches())) if pskd.batches().epoch < 4 else None
            alphas.append(round(pskd.current_alpha, 2))
    assert alphas == [0.4, 0.6, 0.8, 0.8] * 2  # what the look shows is the epoch to come


def test_an_epoch_that_was_broken_off_counts_when_training_goes_on():
    pskd, alphas = bank_of(loader_of()), []
    for _ in range(4):
        epoch_of(pskd, steps=2)
        alphas.append(round(pskd.current_alpha, 2))
        assert pskd.state_dict()['batches'] == dict(epoch=len(alphas) - 1, step=2 * len(alphas), trained=True)
    assert alphas == [0.2, 0.4, 0.6, 0.8]
    within, pskd = {}, bank_of(loader_of())
    epoch_of(pskd, steps=2)
    between = pskd.state_dict()
    for x, y in pskd.batches():
        pskd.loss(network()(x), y)
        within = pskd.state_dict()
        break
    for state, alpha in ((between, 0.4), (within, 0.4)):  # the one goes on with the next, the other begins it anew
        again = bank_of(loader_of())
        again.load_state_dict(state)
        epoch_of(again)
        assert again.current_alpha == pytest.approx(alpha)


def test_plain_batches_are_counted_and_reported(caplog):
    for method in (bank_of(loader_of()), CSKD(loader_of(), network(), labels=Y)):
        model = network() if isinstance(method, PSKD) else method.model
        with caplog.at_level(logging.WARNING):
            for step, (x, y) in enumerate(method.batches()):
                if step not in (0, 2):  # the first one, too, may be skipped
                    method.loss(model(x), y)
        assert f'{method.name}: 2 of 4 batches of epoch 1 were trained on without {method.call}' in caplog.text
        with pytest.raises(RuntimeError, match='and so were all 4 of the epoch'):
            pass_over(method.batches())
    pskd = bank_of(loader_of())
    for _ in range(4):  # an epoch that never ends: of each loop one batch was gone past
        pass_over(pskd.batches(), steps=2)
    with pytest.raises(RuntimeError, match='a batch was trained on without'):
        pass_over(pskd.batches(), steps=2)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from DATA


class Sized(Endless):
    def __len__(self):
        return N


@pytest.mark.parametrize('kind', ['bank', 'snapshot', 'stream'])
def test_a_training_that_counts_steps(kind):
    """An endless loader acts as one that ends where the data end, and alpha grows up to the last step."""
    past = {}
    for how in ('epochs', 'steps'):
        model, alphas, losses = network(), [], []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        many = dict(sampler=Cycled()) if how == 'steps' else {}
        loader = loader_of(**many) if kind != 'stream' or how == 'epochs' else loader_of(Sized())
        length = dict(max_epochs=3) if how == 'epochs' else dict(max_steps=12, max_epochs=None)
        pskd = bank_of(loader, **length) if kind == 'bank' else snapshot_of(loader, model, **length)
        while len(losses) < 12:
            for x, y in pskd.batches():
                loss = pskd.loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                alphas.append(pskd.current_alpha)
                losses.append(loss.item())
                if len(losses) == 12:
                    break
        past[how] = losses, alphas
    assert past['steps'] == past['epochs']
    assert alphas == pytest.approx([0.8 / 3] * 4 + [1.6 / 3] * 4 + [0.8] * 4)
    with pytest.raises(ValueError, match='step 13 of max_steps=12'):
        epoch_of(pskd, model)


class Cycled:
    """As minGPT's sampler: it does not end."""

    def __iter__(self):
        while True:
            yield from range(N)

    def __len__(self):
        return 10**9


def test_a_broken_loop_goes_on_with_the_pass_that_steps_count():
    pskd = bank_of(loader_of(), max_epochs=None, max_steps=12)
    for alpha in (0.8 / 3, 0.8 / 3, 1.6 / 3, 1.6 / 3):
        epoch_of(pskd, steps=2)
        assert pskd.current_alpha == pytest.approx(alpha)


def test_lengths_that_cannot_work_are_refused():
    class Unsized(Cycled):
        __len__ = None

    model = network()
    endless = loader_of(sampler=RandomSampler(DATA, replacement=True, num_samples=10**9))
    for message, make in (
        ('goes over the data 41666666 times .*max_steps= in place of max_epochs=', lambda: bank_of(endless)),
        ('goes over the data', lambda: snapshot_of(endless, model)),
        ('by max_epochs= .* or max_steps=', lambda: bank_of(loader_of(), max_steps=9)),
        ('by max_epochs= .* or max_steps=', lambda: bank_of(loader_of(), max_epochs=None)),
        ('the first 4 steps .a pass over the data. .* ends after 4',
         lambda: bank_of(endless, max_epochs=None, max_steps=4)),
        ('max_steps needs to know how many batches a pass',
         lambda: snapshot_of(loader_of(Endless()), model, max_epochs=None, max_steps=9)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()
    pskd = bank_of(loader_of(sampler=Unsized()))
    with pytest.raises(ValueError, match='goes over the data 10 times'):
        epoch_of(pskd)


def accelerated(prepare_first):
    accelerate = pytest.importorskip('accelerate', reason='accelerate is not installed')
    torch.distributed.init_process_group('gloo')
    accelerator, model = accelerate.Accelerator(cpu=True), network()
    loader = loader_of(shuffle=True)
    pskd = bank_of(accelerator.prepare(loader) if prepare_first else loader)
    batches = accelerator.prepare(pskd.batches())
    rows, losses = [], []
    try:
        for _ in range(2):
            for x, y in batches:
                assert torch.equal(x[:, 0].long(), pskd._rows)
                losses.append(pskd.loss(model(x), y).item() - F.cross_entropy(model(x), y).item())
                rows += pskd._rows.tolist()
    except ValueError as problem:
        return str(problem)
    return rows, losses


@pytest.mark.parametrize('prepare_first', [True, False])
@pytest.mark.parametrize('processes', [1, 2])
def test_accelerate_prepares_the_loader(tmp_path, processes, prepare_first):
    pytest.importorskip('accelerate', reason='accelerate is not installed')
    ranks = in_processes(tmp_path, lambda rank: accelerated(prepare_first), processes)
    if processes == 2 and not prepare_first:
        assert all('prepare the loader first' in problem for problem in ranks)
        return
    assert sorted(row for rows, _ in ranks for row in rows) == sorted([*range(N)] * 2)
    for _, losses in ranks:
        half = len(losses) // 2
        assert losses[:half] == [0] * half
        assert all(losses[half:])


def test_fabric_sets_the_loader_up():
    fabric = pytest.importorskip('lightning.fabric', reason='lightning is not installed').Fabric(accelerator='cpu')
    model, loader = network(), fabric.setup_dataloaders(loader_of(shuffle=True))
    pskd = bank_of(loader)
    for epoch in range(2):
        for x, y in pskd.batches():
            assert torch.equal(x[:, 0].long(), pskd._rows)
            loss = pskd.loss(model(x), y)
            assert (loss.item() == F.cross_entropy(model(x), y).item()) == (epoch == 0)
    with pytest.raises(TypeError, match='DataLoader'):
        fabric.setup_dataloaders(bank_of(loader_of()).batches())


def under_fabric():
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator='cpu', devices=2, strategy='ddp')
    fabric.launch()
    model = fabric.setup(network())
    pskd = bank_of(fabric.setup_dataloaders(loader_of(shuffle=True)))
    rows, losses = [], []
    for _ in range(2):
        for x, y in pskd.batches():
            assert torch.equal(x[:, 0].long(), pskd._rows)
            logits = model(x)
            loss = pskd.loss(logits, y)
            fabric.backward(loss)
            rows.append(pskd._rows.tolist())
            losses.append(loss.item() - F.cross_entropy(logits, y).item())
    return rows, losses


def test_fabric_in_two_processes(tmp_path):
    """Each goes through its share, and learns from what either has predicted."""
    pytest.importorskip('lightning.fabric', reason='lightning is not installed')
    ranks = in_processes(tmp_path, lambda rank: under_fabric(), 2)
    seen = [[row for batch in rows[:2] for row in batch] for rows, _ in ranks]
    assert sorted(seen[0] + seen[1]) == [*range(N)]
    for _, losses in ranks:
        assert losses[:2] == [0, 0]
        assert all(losses[2:])


def test_a_sampler_that_counts_epochs_is_the_users_own():
    sampler = DistributedSampler(DATA, 2, rank=1)
    lent = bank_of(loader_of(sampler=sampler)).batches().lend()
    assert lent.batch_sampler.sampler is sampler
    lent.batch_sampler.sampler.set_epoch(3)
    assert sampler.epoch == 3


class Indexed(Dataset):
    """Samples that say which they are."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return {'which': index, 'x': torch.full((3,), float(index))}


class Fetched(Indexed):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Batch:
    """A batch type of the user's own."""

    def __init__(self, samples):
        self.which = torch.tensor([sample['which'] for sample in samples])


@pytest.mark.parametrize('data', [Indexed(), Fetched(), Subset(Indexed(), range(29, -1, -1))])
@pytest.mark.parametrize(
    'options',
    [
        dict(batch_size=4, shuffle=True),
        dict(batch_size=4, num_workers=2, persistent_workers=True, drop_last=True),
        dict(batch_size=4, sampler='weighted'),
        dict(batch_size=7, sampler='distributed', num_workers=1),
        dict(batch_size=4, collate_fn=Batch, shuffle=True),
        dict(batch_size=None, sampler='random'),
    ],
    ids=['shuffled', 'workers', 'weighted', 'distributed', 'own batches', 'no batches'],
)
def test_rows_travel_with_their_batches(data, options):
    samplers = {
        'weighted': lambda: WeightedRandomSampler(torch.rand(30) + 0.1, 30),
        'distributed': lambda: DistributedSampler(data, 2, rank=1),
        'random': lambda: RandomSampler(data),
    }
    options = {**options, **({'sampler': samplers[options['sampler']]()} if 'sampler' in options else {})}
    loader = DataLoader(data, **options)
    pskd = PSKD(loader, num_classes=3, max_epochs=5)
    assert len(pskd.batches()) == len(loader)
    assert pskd.batches().dataset is data
    for _ in range(2):
        count = 0
        for batch in pskd.batches():
            which = batch.which if isinstance(batch, Batch) else torch.as_tensor(batch['which']).reshape(-1)
            where = pskd._rows if not isinstance(data, Subset) else 29 - pskd._rows
            assert torch.equal(which, where)
            pskd.loss(torch.randn(len(which), 3), torch.zeros(len(which), dtype=torch.long))
            count += 1
        assert count == len(loader)


def test_the_loader_draws_its_seeds_when_the_users_own_would():
    loader, states = loader_of(shuffle=True), []
    for each in (loader, PSKD(loader, 10, max_epochs=2).batches().lend()):
        torch.manual_seed(0)
        iter(each)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
