"""A loss belongs to its forward pass: which past, which maps, which partners, whatever a loop does before the loss."""

import copy
import io
import pickletools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from selfkd_torch import CSKD, FRSKD, PSKD, TokenPSKD

CLASSES = 4
X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % CLASSES


def loader_of(x=X, y=Y, **options):
    return DataLoader(TensorDataset(x, y), **{'batch_size': 6, **options})


def each(batches, step):
    for batch in batches:
        step(*batch)


class Heads(nn.Module):
    """A network with an auxiliary head of the same shape, as torchvision's for segmentation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.out, self.aux = nn.Linear(5, 8), nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, x):
        features = self.body(x).relu()
        return dict(out=self.out(features), aux=self.aux(features))


def linear():
    torch.manual_seed(0)
    return nn.Linear(5, CLASSES)


def snapshot_of(model, loader=None, **options):
    return PSKD(loader or loader_of(), alpha=0.8, max_epochs=2, teacher='snapshot', model=model, **options)


def softened(logits, target, past, alpha=0.8):
    mixed = (1 - alpha) * F.one_hot(target, CLASSES) + alpha * past.softmax(1)
    return -(mixed * logits.log_softmax(1)).sum(1).mean()


def two_epochs(pskd, step):
    """What ``step`` gives in the second epoch, between which the model changes."""
    found = []
    for epoch in range(2):
        for x, y in pskd.batches():
            value = step(x, y)
            found += [value] if epoch else []
        with torch.no_grad():
            for parameter in pskd.model.parameters():
                parameter.mul_(1.5)
    return found


class Failing(nn.Linear):
    """As a model that runs out of memory: the loop catches it."""

    fails = False

    def forward(self, x):
        if self.fails and self.weight.requires_grad:  # the student's
            self.fails = False
            raise RuntimeError('out of memory')
        return super().forward(x)


def test_a_call_that_fails_and_one_that_checkpoint_repeats():
    """Whatever happens to a call, the next one has its own past."""
    torch.manual_seed(0)
    model = Failing(5, CLASSES)
    pskd = snapshot_of(model, loader_of(batch_size=12))

    def step(x, y):
        model.fails = True
        with pytest.raises(RuntimeError, match='out of memory'):
            model(x[:6])
        found = []
        for part in (slice(6, 12), slice(0, 6)):
            logits = checkpoint(model, x[part], use_reentrant=False)  # backward() breaks off its second call
            loss = pskd.loss(logits, y[part])
            loss.backward()
            found.append((loss, softened(logits, y[part], pskd.past.teacher(x[part]))))
        return found

    for loss, expected in sum(two_epochs(pskd, step), []):
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize('teacher', ['bank', 'snapshot'])
def test_a_validation_loss_within_an_epoch_is_refused(teacher):
    """Else the past of the training batch would be in it."""
    model = linear()
    pskd = PSKD(loader_of(), alpha=0.8, max_epochs=2) if teacher == 'bank' else snapshot_of(model)
    for x, y in pskd.batches():
        with torch.no_grad(), pytest.raises(RuntimeError, match='for validation use the plain one'):
            pskd.loss(model(-x), y)
        pskd.loss(model(x), y)
        with torch.no_grad(), pytest.raises(RuntimeError, match='for validation use the plain one'):
            pskd.loss(model(-x), y)
        break


@pytest.mark.parametrize('frozen', ['norm', 'all'])
def test_the_copy_runs_in_the_mode_that_each_call_has(frozen):
    """Loops that set it in each step, and that train in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.0), nn.Linear(5, CLASSES))
    pskd = snapshot_of(model)

    def step(x, y):
        model.train()
        (model if frozen == 'all' else model[0]).eval()
        logits = model(x)
        return pskd.loss(logits, y), softened(logits, y, past[0](x))

    past = []
    for _ in range(2):
        past[:] = [copy.deepcopy(model).eval()]
        found = [step(x, y) for x, y in pskd.batches()]
        model.train()
        with torch.no_grad():
            model[2].weight.mul_(2)
    for loss, expected in found:
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    'of_output',
    [lambda z: z, lambda z: z.float().view(6, CLASSES), lambda z: z.clone().mul_(1), lambda z: z[torch.arange(6)]],
    ids=['as it came', 'cast', 'in place', 'indexed'],
)
def test_two_calls_before_the_losses(of_output):
    """FixMatch, Siamese networks, R-Drop: each loss has the past of its own call."""
    model = linear()
    pskd = snapshot_of(model)

    def step(x, y):
        first, second = model(x), model(-x)
        losses = [pskd.loss(of_output(second), y), pskd.loss(of_output(first), y)]
        return [
            (losses[1], softened(first, y, pskd.past.teacher(x))),
            (losses[0], softened(second, y, pskd.past.teacher(-x))),
        ]

    for loss, expected in sum(two_epochs(pskd, step), []):
        torch.testing.assert_close(loss, expected)


def test_logits_of_no_call_or_of_two_are_refused_in_the_first_epoch():
    model = Heads()
    for message, of_outputs in (
        ('come from none of the 1 calls', lambda a, x: a['aux']),
        ('come from 2 of the 2 calls', lambda a, x: a['out'] + model(x)['out']),
    ):
        pskd = snapshot_of(model, outputs=lambda output: output['out'])
        with pytest.raises(RuntimeError, match=message):
            each(pskd.batches(), lambda x, y: pskd.loss(of_outputs(model(x), x), y))  # noqa: B023
    pskd = snapshot_of(model)
    with pytest.raises(ValueError, match='the Heads gives a dict: say which part of it is the logits'):
        two_epochs(pskd, lambda x, y: F.cross_entropy(model(x)['out'], y) if pskd.data.epoch else _used(pskd))
    model = linear()
    pskd = snapshot_of(model)
    with pytest.raises(RuntimeError, match='use_reentrant=True'):
        each(pskd.batches(), lambda x, y: pskd.loss(checkpoint(model, x.requires_grad_(), use_reentrant=True), y))


@pytest.mark.parametrize(
    'move', [lambda z: z[[1, 0, 2, 3, 4, 5]], lambda z: z.flip(0), lambda z: torch.cat([z[3:], z[:3]])]
)
def test_samples_in_another_order_than_the_call_s_are_refused(move):
    model = linear()
    pskd = snapshot_of(model)
    with pytest.raises(RuntimeError, match='samples were put in another order'):
        each(pskd.batches(), lambda x, y: pskd.loss(move(model(x)), move(y)))


def test_an_index_that_moves_no_sample_and_arithmetic_are_no_harm():
    model = linear()
    pskd = snapshot_of(model)
    two_epochs(pskd, lambda x, y: pskd.loss(model(x)[y >= 0] / 2, y).backward())
    assert float(pskd.logs['pskd_soft']) > 0


def _used(pskd):
    pskd.used = 1


def test_a_tap_leaves_auxiliary_heads_alone():
    model = Heads()
    pskd = snapshot_of(model, outputs=lambda output: output['out'])

    def step(x, y):
        with pskd.tap():
            output = model(x)
            main, aux = F.cross_entropy(output['out'], y), F.cross_entropy(output['aux'], y)
        with torch.no_grad():
            return (main, softened(output['out'], y, pskd.past.teacher(x)['out'])), (
                aux,
                F.cross_entropy(output['aux'], y),
            )

    for loss, expected in sum(two_epochs(pskd, step), ()):
        torch.testing.assert_close(loss, expected)


class LossInside(Heads):
    """As the models of Hugging Face."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x, y):
        output = super().forward(x)
        return dict(output, loss=F.cross_entropy(output[self.name], y))


def test_a_loss_within_the_model():
    model = LossInside('out')
    pskd = snapshot_of(model, outputs=lambda output: output['out'].flatten(0, -2))

    def step(x, y):
        with pskd.tap():
            output = model(x, y)
        return output['loss'], softened(output['out'], y, pskd.past.teacher(x, y)['out'])

    for loss, expected in two_epochs(pskd, step):
        torch.testing.assert_close(loss, expected)
    model = LossInside('aux')
    pskd = snapshot_of(model, outputs=lambda output: output['out'])
    with pytest.raises(RuntimeError, match='computes a cross-entropy of other logits than outputs= gives'), pskd.tap():
        each(pskd.batches(), model)


class WritesIntoItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.seen = nn.Linear(5, CLASSES), []

    def forward(self, batch):
        x = batch['x'] if isinstance(batch, dict) else batch if isinstance(batch, torch.Tensor) else batch.x
        self.seen.append(x.sub_(0.5).mean().item())
        return self.head(x)


class Own:
    def __init__(self, x):
        self.x = x


class Stored:
    """As PyTorch Geometric's batches are: the tensors lie in an object within."""

    def __init__(self, x):
        self.store, self.owner = Own(x), self

    @property
    def x(self):
        return self.store.x


WRAPS = [lambda x: x, lambda x: dict(x=x), Own, Stored]


@pytest.mark.parametrize('wrap', WRAPS, ids=['tensor', 'dict', 'own type', 'own type with another inside'])
def test_a_model_that_writes_into_its_input(wrap):
    model = WritesIntoItsInput()
    pskd = snapshot_of(model, loader_of(torch.ones(6, 5), Y[:6]))
    two_epochs(pskd, lambda x, y: pskd.loss(model(wrap(x)), y))
    assert model.seen == [0.5, 0.5]


def test_a_model_can_be_saved_and_copied_within_an_epoch():
    """A pickle of it names nothing of ours, and what it gives is the model as it was."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1), nn.Flatten(), nn.Linear(16, CLASSES))
    images = torch.randn(6, 3, 4, 4)
    frskd = FRSKD(model, ['0', '1'], CLASSES, example=images)
    pskd = snapshot_of(model, loader_of(images, Y[:6]))
    for x, y in pskd.batches():
        pskd.loss(model(x), y)
        stored = io.BytesIO()
        torch.save(model, stored, _use_new_zipfile_serialization=False)
        assert 'selfkd' not in str([argument for _, argument, _ in pickletools.genops(_longest(stored.getvalue()))])
        stored.seek(0)
        options = dict(weights_only=False) if torch.__version__ >= '2.6' else {}
        for again in (torch.load(stored, **options), copy.deepcopy(model)):
            frskd._feats.clear()
            assert torch.equal(again(x), model.forward(x))
            assert len(frskd._feats) == 2  # of model.forward


def _longest(stored):
    """Of the pickles that torch writes one after the other, that of the object."""
    start, pickles = 0, []
    while start < len(stored) and stored[start : start + 1] == b'\x80':
        stream = io.BytesIO(stored[start:])
        list(pickletools.genops(stream))
        pickles.append(stored[start : start + stream.tell()])
        start += stream.tell()
    return max(pickles, key=len)


def test_a_criterion_in_a_tap_is_softened_with_its_options():
    options = (
        dict(reduction='sum'),
        dict(weight=torch.tensor([1.0, 5.0, 1.0, 9.0])),
        dict(ignore_index=2, label_smoothing=0.2),
        dict(size_average=False),
        dict(reduce=False),
    )

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, logits, target):
            return 2 * self.inner(logits, target)

    for option in options:
        found = []
        for how in ('explicit', 'tap()', 'tap(criterion)', 'tap(wrapped)'):
            model, criterion = linear(), nn.CrossEntropyLoss(**option)
            pskd = PSKD(loader_of(), num_classes=CLASSES, alpha=0.8, max_epochs=2)
            used = Wrapped(criterion) if how == 'tap(wrapped)' else criterion
            for _ in range(2):
                if how == 'explicit':
                    same = {name: getattr(criterion, name) for name in ('weight', 'ignore_index', 'reduction')}
                    for x, y in pskd.batches():
                        value = pskd.loss(model(x), y, label_smoothing=criterion.label_smoothing, **same)
                else:
                    with pskd.tap(None if how == 'tap()' else used):
                        for x, y in pskd.batches():
                            value = used(model(x), y) / (2 if how == 'tap(wrapped)' else 1)
            found.append(value)
        for value in found[1:]:
            torch.testing.assert_close(value, found[0])


class Written(nn.Module):
    """A loss that is written without torch's cross-entropy."""

    def __init__(self, kind, smoothing=0.1):
        super().__init__()
        self.kind, self.smoothing = kind, smoothing

    def forward(self, logits, target):
        log_probs, hot = logits.log_softmax(1), F.one_hot(target, CLASSES).float()
        hot = (1 - self.smoothing) * hot + self.smoothing / CLASSES
        if self.kind == 'binary':
            return F.binary_cross_entropy_with_logits(logits, hot)
        if self.kind == 'adjusted':
            log_probs = (logits + torch.arange(CLASSES)).log_softmax(1)
        losses = -(hot * log_probs).sum(1)
        if self.kind == 'focal':
            losses = (1 - (-losses).exp()) ** 2 * losses
        if self.kind == 'weighted':
            losses = losses * (1 + target)
        return losses.sum() if self.kind == 'sum' else losses if self.kind == 'each' else losses.mean()


@pytest.mark.parametrize('kind', ['mean', 'each'])
def test_a_loss_written_another_way_and_samples_without_a_past(kind):
    """Samples that are new in the second epoch keep their smoothed labels."""
    x, y = torch.cat([X, X + 1]), torch.cat([Y, Y])
    found = []
    for how in ('explicit', 'tap'):
        model, order = linear(), [*range(6), *range(6, 12)]
        pskd = PSKD(loader_of(x, y, sampler=order, batch_size=12), num_classes=CLASSES, alpha=0.8, max_epochs=2)
        for _ in range(2):
            with pskd.tap(Written(kind)) if how == 'tap' else torch.enable_grad():
                criterion = Written(kind)
                for a, b in pskd.batches():
                    if how == 'explicit':
                        value = pskd.loss(model(a), b, label_smoothing=0.1)
                        continue
                    with pskd.tap(criterion, check=False):
                        value = criterion(model(a), b).mean()
            order[:] = range(6, 18)
        found.append(value)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize('kind', ['binary', 'focal', 'adjusted', 'weighted', 'sum'])
def test_a_loss_that_is_no_plain_cross_entropy_is_refused(kind):
    criterion, model = Written(kind), linear()
    pskd = PSKD(loader_of(), num_classes=CLASSES, alpha=0.8, max_epochs=2)
    message = r'tap\(Written\(\)\): .* it is not the cross-entropy of a softmax'
    with pytest.raises(ValueError, match=message), pskd.tap(criterion):
        each(pskd.batches(), lambda x, y: criterion(model(x), y))
    assert not {*criterion._forward_hooks, *criterion._forward_pre_hooks}
    assert torch._C._len_torch_function_stack() == 0


def test_a_criterion_is_looked_at_in_each_epoch():
    criterion, model = Written('smoothed'), linear()
    pskd = PSKD(loader_of(), num_classes=CLASSES, alpha=0.8, max_epochs=2)
    with pskd.tap(criterion):
        each(pskd.batches(), lambda x, y: criterion(model(x), y))
    criterion.kind = 'focal'  # as of some schedule
    with pytest.raises(ValueError, match='it is not the cross-entropy of a softmax'), pskd.tap(criterion):
        each(pskd.batches(), lambda x, y: criterion(model(x), y))


def conv():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )


def test_frskd_takes_the_maps_of_the_pass_that_the_loss_is_of():
    a, b, y = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.arange(4)
    model = conv()
    frskd = FRSKD(model, ['0', '1'], CLASSES, example=a)
    apart = [frskd.loss(model(x), y) for x in (a, b)]
    first, second = model(a), model(b)
    torch.testing.assert_close([frskd.loss(second, y), frskd.loss(first, y)], apart[::-1])
    with pytest.raises(RuntimeError, match='of 2 passes .* the logits come from 2'):
        frskd.loss(model(a) + model(b), y)
    for _ in range(20):  # trained without: nothing is heaped up
        model(a)
    assert len(frskd._feats) <= 16
    frskd.add_hooks()
    model(b)
    model(a)  # the loss of which never comes
    torch.testing.assert_close(frskd.loss(model(b), y), apart[1])
    frskd.add_hooks()
    with pytest.raises(RuntimeError, match='use_reentrant=False'):
        frskd.loss(checkpoint(model, a.requires_grad_(), use_reentrant=True), y)


class Checkpointed(nn.Sequential):
    """Its first layer is not repeated in the backward pass, the others are."""

    def forward(self, x):
        return checkpoint(self.rest, self[0](x), use_reentrant=False)

    def rest(self, x):
        for layer in [*self][1:]:
            x = layer(x)
        return x


def test_frskd_takes_no_maps_of_a_checkpoint_s_second_pass():
    images, y = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    found = []
    for kind in (nn.Sequential, Checkpointed):
        model = kind(*conv())
        frskd = FRSKD(model, ['0', '1'], CLASSES, example=images[0])
        found.append([])
        for x in images:
            loss = frskd.loss(model(x), y)
            loss.backward()
            found[-1].append(loss.detach())
    torch.testing.assert_close(*found)


def test_a_self_teacher_that_no_optimizer_trains_is_said(monkeypatch, caplog):
    monkeypatch.setattr('selfkd_torch.frskd.IDLE', 3)
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    for forgotten in (False, True):
        model = conv()
        frskd = FRSKD(model, ['0', '1'], CLASSES, example=x)
        optimizer = torch.optim.SGD([*model.parameters(), *([] if forgotten else frskd.parameters())], lr=0.01)
        for _ in range(4):
            frskd.loss(model(x), y).backward()
            optimizer.step()
        assert ('has the optimizer its parameters' in caplog.text) is forgotten


def test_frskds_hooks_come_off_and_on():
    model, x, y = conv(), torch.randn(4, 3, 8, 8), torch.arange(4)
    frskd = FRSKD(model, ['0', '1'], CLASSES, example=x)
    expected = frskd.loss(model(x), y)
    frskd.remove_hooks()
    assert torch.equal(torch.jit.script(model)(x), model(x))
    with pytest.raises(RuntimeError, match=r'add_hooks\(\) puts them back'):
        frskd.loss(model(x), y)
    frskd.add_hooks()
    assert torch.equal(frskd.loss(model(x), y), expected)


def test_frskd_and_compiled_models():
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    plain, model = conv(), conv()
    expected = FRSKD(plain, ['0', '1'], CLASSES, example=x)
    compiled = torch.compile(model, backend='eager')
    frskd = FRSKD(compiled, ['0', '1'], CLASSES, example=x)
    frskd.load_state_dict(expected.state_dict())
    for _ in range(2):
        torch.testing.assert_close(frskd.loss(compiled(x), y), expected.loss(plain(x), y))
    with pytest.raises(RuntimeError, match='make FRSKD first'):  # where torch does not look for hooks that are new
        frskd.loss(conv()(x), y)


class Seeing(nn.Linear):
    """Notes what it is called with."""

    def __init__(self):
        super().__init__(5, CLASSES)
        self.means = []

    def forward(self, x):
        self.means.append(x.mean().item())
        return super().forward(x)


def normalized(x):
    return (x - 100) / 10


def test_partners_are_prepared_as_the_batch_is():
    images = 100 + 10 * X
    for change, inputs in (
        (lambda x: x, None),
        (normalized, lambda batch: normalized(batch[0])),
        (lambda x: normalized(x) + torch.randn(6, 5), lambda batch: normalized(batch[0]) + torch.randn(6, 5)),
        (lambda x: x.sub_(100), lambda batch: batch[0].sub_(100)),
        (lambda x: x.to(torch.float64).float(), None),
    ):
        cskd = CSKD(loader_of(images), Seeing(), labels=Y, inputs=inputs)
        for x, y in cskd.batches():
            cskd.loss(cskd.model(change(x)), y)
        assert len(cskd.model.means) == 4
        assert max(cskd.model.means) - min(cskd.model.means) < 10
        assert not cskd.model._forward_pre_hooks
    for change in (normalized, lambda x: x.sub_(100), lambda x: x + torch.randn(6, 5)):
        cskd = CSKD(loader_of(images), linear(), labels=Y)
        with pytest.raises(ValueError, match='the Linear was called with .* of mean .*, but partners would come as'):
            each(cskd.batches(), lambda x, y: cskd.loss(cskd.model(change(x)), y))  # noqa: B023
    cskd = CSKD(loader_of(images), linear(), labels=Y)
    each(cskd.batches(), lambda x, y: cskd.loss(cskd.model(x), y))
    with pytest.raises(ValueError, match='but partners would come as'):  # in a later epoch, too
        each(cskd.batches(), lambda x, y: cskd.loss(cskd.model(normalized(x)), y))
    cskd = CSKD(loader_of(), linear(), labels=Y)
    with pytest.raises(RuntimeError, match='given as model= was not called before the loss'):
        each(cskd.batches(), lambda x, y: cskd.loss(torch.randn(6, CLASSES, requires_grad=True), y))


def test_the_look_at_the_inputs_draws_nothing():
    """Else a resumed run, which looks in its first epoch, would draw other noise than the run that it resumes."""
    drawn = []

    def noisy(batch):
        drawn.append(torch.rand(()).item())
        return batch[0] + 1e-6 * drawn[-1]

    cskd = CSKD(loader_of(), linear(), labels=Y, inputs=noisy)
    torch.manual_seed(0)
    for x, y in cskd.batches():
        cskd.loss(cskd.model(x), y)
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()  # the loader's seed
    assert drawn[2:] == [torch.rand(()).item() for _ in range(2)]


def test_half_precision_class_weights():
    for how in ('loss', 'tap'):
        model, criterion = linear().bfloat16(), nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4]).bfloat16())
        pskd = PSKD(loader_of(X.bfloat16()), num_classes=CLASSES, alpha=0.8, max_epochs=2)
        for _ in range(2):
            for x, y in pskd.batches():
                with pskd.tap(criterion, check=False):
                    logits = model(x)
                    loss = criterion(logits, y) if how == 'tap' else pskd.loss(logits, y, weight=criterion.weight)
                loss.backward()
        assert loss.isfinite()


VOCABULARY = 12
TEXTS = [torch.randint(VOCABULARY, (4,), generator=torch.Generator().manual_seed(i)) for i in range(5)]


@pytest.mark.parametrize('kind', ['ids', 'dicts', 'pairs'])
@pytest.mark.parametrize('classes', [None, VOCABULARY])
def test_tokens_in_batches_with_one_label_for_each_sample(kind, classes):
    """The last text has a single label, and is a batch of its own; the first time, too."""
    texts = [TEXTS[0][:2], *TEXTS, TEXTS[1][:2]]
    samples = {
        'ids': texts,
        'dicts': [dict(input_ids=text) for text in texts],
        'pairs': [(text, text) for text in texts],
    }[kind]
    entry = dict(ids=lambda sample: sample, dicts=lambda sample: sample['input_ids'], pairs=lambda sample: sample[0])
    loader = DataLoader(samples, batch_size=1, collate_fn=lambda batch: torch.stack(list(map(entry[kind], batch))))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY))
    pskd, past = TokenPSKD(loader, classes, max_epochs=3, top_k=VOCABULARY, bank_dtype='float32'), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for epoch in range(3):
        for i, ids in enumerate(pskd.batches()):
            logits, y = model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
            loss = pskd.loss(logits, y)
            if epoch:
                alpha = pskd.current_alpha
                target = (1 - alpha) * F.one_hot(y, VOCABULARY) + alpha * past[i]
                torch.testing.assert_close(loss, -(target * logits.log_softmax(1)).sum(1).mean())
            past[i] = logits.detach().softmax(1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert pskd.bank.num_samples == 24
    assert pskd.bank._tables[0].dtype == torch.float32
    again = TokenPSKD(loader, max_epochs=3, top_k=VOCABULARY, bank_dtype='float32')
    again.load_state_dict(pskd.state_dict())
    assert torch.equal(again.state_dict()['bank']['values'], pskd.state_dict()['bank']['values'])


def test_samples_with_single_labels_have_a_bank_of_samples():
    pskd = TokenPSKD(loader_of(), CLASSES, max_epochs=2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert not pskd._has_tokens()
    assert torch.equal(state, torch.get_rng_state())
    model = linear()
    each(pskd.batches(), lambda x, y: pskd.loss(model(x), y))
    assert (pskd.bank.num_samples, pskd.bank.top_k, pskd.alpha) == (12, None, 0.3)
    tokens = TokenPSKD(DataLoader(TEXTS), VOCABULARY, max_epochs=2)
    for ids in tokens.batches():
        tokens.loss(torch.zeros(3, VOCABULARY), ids[0, 1:])
    assert (tokens.bank._tables[0].dtype, tokens.bank.top_k, tokens.alpha) == (torch.float16, 8, 0.3)
    on_meta = TokenPSKD(DataLoader(TEXTS), VOCABULARY, max_epochs=2, bank_device='meta')
    for ids in on_meta.batches():
        on_meta.loss(torch.zeros(3, VOCABULARY), ids[0, 1:])
        break
    assert on_meta.bank._tables[0].is_meta
    with pytest.raises(
        ValueError, match="the state's bank is of tokens, but the training set's samples have labels for s"
    ):
        pskd.load_state_dict(tokens.state_dict())
