"""Self-distillation under Lightning's own Trainer, over real scans of digits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.loops import EPOCHS, LogSoftmaxLoss, network
from helpers.processes import in_processes
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

pl = pytest.importorskip('lightning.pytorch', reason='lightning is not installed')

import selfkd_torch  # noqa: E402
from selfkd_lightning import CSKD, FRSKD, PSKD  # noqa: E402


class Classifier(pl.LightningModule):
    """A user's module: nothing in it knows of self-distillation."""

    def __init__(self, criterion=F.cross_entropy, seeded=False):
        super().__init__()
        self.net = network()
        self.criterion, self.seeded, self.losses = criterion, seeded, []

    def loss_of(self, batch):
        x, y = batch
        return self.criterion(self.net(x), y)

    def training_step(self, batch, batch_idx):
        if self.seeded:  # Lightning's checkpoints hold no random states
            torch.manual_seed(self.global_step)
        loss = self.loss_of(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            self.log('val', self.loss_of(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.2, momentum=0.9)


def loader_of(data, **options):
    return DataLoader(data, **{'batch_size': 20, 'shuffle': True, **options})


def fit(module, loader, *callbacks, ckpt_path=None, folder=None, **options):
    options = {'max_epochs': EPOCHS, 'accelerator': 'cpu', 'num_sanity_val_steps': 0, **options}
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)
    if not any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks):
        quiet['enable_checkpointing'] = False
    trainer = pl.Trainer(callbacks=list(callbacks), **quiet, **options)
    torch.manual_seed(1)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def in_a_plain_loop(data, **options):
    """What selfkd_torch makes of the same model in a user's own loop."""
    module = Classifier(seeded=True)
    optimizer = module.configure_optimizers()
    torch.manual_seed(1)
    if options['teacher'] != 'bank':
        options['model'] = module.net
    pskd = selfkd_torch.PSKD(loader_of(data, shuffle=False), alpha=0.8, max_epochs=EPOCHS, **options)
    losses = []
    for _ in range(EPOCHS):
        for x, y in pskd.batches():
            torch.manual_seed(len(losses))
            loss = pskd.loss(module.net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    'options',
    [
        dict(teacher='bank'),
        dict(teacher='snapshot'),
        dict(teacher='ema', ema_decay=0.5, keep_hard=True),
        dict(teacher='bank', bank_momentum=0.5),
    ],
    ids=['bank', 'snapshot', 'ema', 'momentum'],
)
def test_it_is_the_plain_loop(digits, options):
    callback = PSKD(alpha=0.8, **options)
    module = fit(Classifier(seeded=True), loader_of(digits, shuffle=False), callback)
    assert module.losses == pytest.approx(in_a_plain_loop(digits, **options), rel=1e-5)
    assert callback.current_alpha == pytest.approx(0.8)
    plain = fit(Classifier(seeded=True), loader_of(digits, shuffle=False))
    assert module.losses[:3] == plain.losses[:3]
    assert all(abs(a - b) > 1e-4 for a, b in zip(module.losses[3:], plain.losses[3:]))


@pytest.mark.parametrize('teacher', ['bank', 'snapshot'])
@pytest.mark.parametrize('options', [{}, dict(num_workers=1, persistent_workers=True)], ids=['', 'workers'])
def test_weight_zero_is_plain_training_to_the_last_bit(digits, teacher, options):
    plain = fit(Classifier(), loader_of(digits, **options))
    zero = fit(Classifier(), loader_of(digits, **options), PSKD(alpha=0.0, teacher=teacher))
    assert zero.losses == plain.losses
    assert same(zero, plain)


class Rows(PSKD):
    """Keeps which samples were trained on, as the batches say and as the callback takes it."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        data = self._data.loader.dataset
        assert torch.equal(batch[0], torch.stack([data[row][0] for row in self.pskd._rows]))
        self.rows = [*getattr(self, 'rows', []), self.pskd._rows]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class FromHooks(pl.LightningDataModule):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def train_dataloader(self):
        return loader_of(self.data, batch_size=15, num_workers=1)

    def val_dataloader(self):
        return loader_of(self.data, shuffle=False)


def test_rows_are_those_of_the_batches(digits, tmp_path):
    """With workers, validation within the epoch, data modules, reloaded loaders, limits, and accumulation."""
    half = Rows()
    fit(Classifier(), loader_of(ConcatDataset([digits, digits])), half, limit_train_batches=0.5, max_epochs=2)
    assert len(half.rows) == 2 * 3
    assert half.pskd.bank.num_samples == 120
    few = Rows()
    fit(Classifier(), loader_of(digits), few, overfit_batches=1, max_epochs=4)
    assert [rows.tolist() for rows in few.rows] == [list(range(20))] * 4
    whole = Rows()
    module = fit(
        Classifier(),
        FromHooks(digits),
        whole,
        val_check_interval=2,
        reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=2,
        max_epochs=-1,
        max_steps=6,
    )
    assert len(module.losses) == 12
    assert whole.pskd.max_epochs == 3
    assert sorted(torch.cat(whole.rows[4:8]).tolist()) == list(range(60))
    assert whole.pskd.count == 12  # validation computes the loss as well, with gradients
    compiled, plain = Classifier(), fit(Classifier(), loader_of(digits), PSKD())
    compiled.net = torch.compile(compiled.net, backend='eager')
    assert fit(compiled, loader_of(digits), PSKD()).losses == pytest.approx(plain.losses)


class Explicit(Classifier):
    def configure_callbacks(self):
        self.pskd = PSKD(alpha=0.8)
        self.criterion = self.pskd.loss
        return [self.pskd]


class OwnLoss(nn.Module):
    """Written with log_softmax, as timm's."""

    def forward(self, x, target):
        return -x.log_softmax(-1).gather(1, target[:, None]).mean()


def test_the_loss_said_explicitly_or_computed_another_way(digits):
    tapped = fit(Classifier(), loader_of(digits), PSKD(alpha=0.8))
    explicit = Explicit()
    fit(explicit, loader_of(digits))
    assert explicit.losses == tapped.losses
    own = fit(Classifier(OwnLoss()), loader_of(digits), PSKD(alpha=0.8, loss='criterion'))
    assert own.losses == pytest.approx(tapped.losses, rel=1e-5)


def test_mixed_precision(digits):
    callback = PSKD()
    module = fit(Classifier(), loader_of(digits), callback, precision='bf16-mixed')
    plain = fit(Classifier(), loader_of(digits), precision='bf16-mixed')
    assert module.losses[:3] == plain.losses[:3]
    assert module.losses[3:] != plain.losses[3:]
    assert callback.pskd.bank.read(torch.arange(60)).dtype == torch.float32


@pytest.mark.parametrize('teacher', ['bank', 'snapshot', 'ema'])
@pytest.mark.parametrize('when', ['end', 'validation', 'middle'])
def test_resume_is_exact(digits, teacher, when, tmp_path):
    """From a checkpoint of the end of epoch 2, of its validation, or (bank) of its first step."""
    how = dict(end={}, validation=dict(save_on_train_epoch_end=False), middle=dict(every_n_train_steps=4))[when]
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, **how)
    loaders = pl.LightningDataModule.from_datasets(digits, digits, batch_size=20)
    loaders.train_dataloader = lambda: loader_of(digits, shuffle=False)
    straight, callback = Classifier(seeded=True), PSKD(alpha=0.8, teacher=teacher)
    fit(straight, loaders, checkpoint, callback, folder=tmp_path)
    step = 4 if when == 'middle' else 6
    (saved,) = tmp_path.glob(f'*step={step}.ckpt')
    torch.load(saved, weights_only=True)
    resumed, again = Classifier(seeded=True), PSKD(alpha=0.8, teacher=teacher)
    fit(resumed, loaders, again, ckpt_path=saved, folder=tmp_path)
    if when == 'middle':  # Lightning begins the epoch's data anew
        assert again.current_alpha == pytest.approx(0.8)
        return
    assert resumed.losses == straight.losses[6:]
    assert same(resumed, straight)
    if teacher == 'bank':
        banks = [run.state_dict()['bank'] for run in (again, callback)]
        assert banks[0].pop('dtype') == banks[1].pop('dtype')
        torch.testing.assert_close(*banks, rtol=0, atol=0)


def distributed(data, folder):
    callback = Rows()
    checkpoint = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
    strategy = pl.strategies.DDPStrategy(process_group_backend='gloo')
    loader = loader_of(data, batch_size=10)
    options = dict(devices=2, strategy=strategy, folder=folder)
    module = fit(Classifier(), loader, callback, checkpoint, **options)
    snapshot = PSKD(teacher='snapshot')
    fit(Classifier(), loader, snapshot, **{**options, 'strategy': 'ddp'})
    return dict(
        bank=callback.pskd.bank.state_dict(),
        rows=torch.cat(callback.rows[:3]),
        weights=module.state_dict(),
        past=snapshot.pskd.past.model.state_dict(),
    )


def test_two_processes_hold_one_bank(digits, tmp_path):
    one, two = in_processes(tmp_path, lambda rank: distributed(digits, tmp_path), 2)
    assert sorted([*one['rows'].tolist(), *two['rows'].tolist()]) == list(range(60))  # Lightning's sampler is in it
    assert one['bank'].pop('dtype') == two['bank'].pop('dtype')
    for part in ('bank', 'weights'):
        for name, value in one[part].items():
            if 'running' not in name:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[part][name])), name
    assert bool(one['bank']['seen'].all())
    assert torch.equal(one['past']['0.weight'], two['past']['0.weight'])
    (saved,) = tmp_path.glob('*step=2.ckpt')
    (state,) = [s for s in torch.load(saved, weights_only=True)['callbacks'].values() if 'bank' in s]
    assert int(state['bank']['seen'].sum()) == 2 * 10 * 2  # of both processes, though saved within an epoch


def backwards(samples):
    return torch.utils.data.default_collate(samples[::-1])


def test_samples_that_are_moved_within_a_batch_are_refused(digits):
    """As a collate function does that sorts by length: what was predicted would be another sample's."""
    with pytest.raises(ValueError, match='the samples of a batch are not those that the sampler chose'):
        fit(Classifier(), loader_of(digits, collate_fn=backwards), PSKD())
    assert len(fit(Classifier(), loader_of(digits, collate_fn=backwards), PSKD(teacher='snapshot')).losses) == 9


class Looks(pl.Callback):
    """Computes losses beside training_step: with gradients, of a part of a batch, before and after the step."""

    def __init__(self, data):
        self.batch, self.losses = next(iter(loader_of(data, batch_size=7, shuffle=False))), []

    def look(self, trainer, pl_module, *args):
        x, y = self.batch
        with torch.no_grad():
            plain = F.cross_entropy(pl_module.net.eval()(x), y)
        with torch.enable_grad():
            shared = pl_module.criterion if trainer.validating else F.cross_entropy
            loss = shared(pl_module.net(x), y)
        pl_module.net.train(trainer.training)
        self.losses.append((loss - plain).item())

    on_train_batch_start = on_train_batch_end = on_validation_batch_end = look


@pytest.mark.parametrize('explicit', [False, True])
@pytest.mark.parametrize('teacher', ['bank', 'snapshot'])
def test_what_is_computed_beside_training_step_is_plain(digits, teacher, explicit):
    """In callbacks before and after ours, in validation within the epoch, and by a loss that both steps share."""
    callback, looks = PSKD(alpha=0.8, teacher=teacher), [Looks(digits), Looks(digits)]
    module = Classifier()
    module.net[3] = nn.Identity()  # what a look draws would be another mask
    if explicit:
        module.criterion = callback.loss
    loaders = FromHooks(digits)
    fit(module, loaders, looks[0], callback, looks[1], val_check_interval=2, num_sanity_val_steps=1)
    assert callback.current_alpha == pytest.approx(0.8)
    assert all(len(look.losses) > 2 * len(module.losses) for look in looks)
    assert max(map(abs, looks[0].losses + looks[1].losses)) < 1e-6


class TwoViews(Classifier):
    """Calls the network on another view as well, before the loss of the first."""

    def loss_of(self, batch):
        x, y = batch
        logits = self.net(x)
        with torch.random.fork_rng():
            self.net(x.flip(1))
        return self.criterion(logits, y)


def test_a_loss_belongs_to_its_forward_pass(digits):
    one, two = (fit(kind(), loader_of(digits), PSKD(teacher='snapshot')) for kind in (Classifier, TwoViews))
    assert two.losses == one.losses


class LeavesOut(Classifier):
    """A step that returns None is left out by Lightning."""

    def __init__(self, which):
        super().__init__()
        self.which = which

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.which else super().training_step(batch, batch_idx)


def test_a_step_may_return_none(digits):
    for which in ([0], [2]):
        assert len(fit(LeavesOut(which), loader_of(digits), PSKD()).losses) == 2 * EPOCHS
    with pytest.raises(RuntimeError, match='(?s)PSKD: .*plain'):
        fit(LeavesOut([0, 1, 2]), loader_of(digits), PSKD())


class Augments(torch.utils.data.Dataset):
    """As those do whose transform is switched within the run."""

    def __init__(self, data):
        self.data, self.strength = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + self.strength, y


class Switches(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        trainer.train_dataloader.dataset.strength = trainer.current_epoch


def test_what_is_set_on_the_loaders_data_set_arrives_there(digits):
    data = Augments(digits)
    fit(Classifier(), loader_of(data), Switches(), PSKD())
    assert data.strength == EPOCHS - 1


@pytest.mark.parametrize('what', ['EarlyStopping', 'max_time'])
def test_a_training_that_may_end_early_is_told_of(digits, caplog, what):
    callbacks, options = [], dict(max_time='00:01:00:00')
    if what == 'EarlyStopping':
        callbacks, options = [pl.callbacks.EarlyStopping('val', patience=9)], {}
    fit(Classifier(), FromHooks(digits), PSKD(), *callbacks, **options)
    assert f'where {what} ends training earlier, it does not get there' in caplog.text
    caplog.clear()
    fit(Classifier(), loader_of(digits), PSKD(alpha=0.0), **options)
    assert 'does not get there' not in caplog.text


class Mixed(Classifier):
    """Mixup."""

    def loss_of(self, batch):
        x, y = batch
        target = F.one_hot(y, 10).float()
        return self.criterion(self.net(0.7 * x + 0.3 * x.flip(0)), 0.7 * target + 0.3 * target.flip(0))


def test_auto_takes_the_bank_or_the_snapshot_and_a_checkpoint_decides(digits, caplog, tmp_path):
    """The first loss shows whether a prediction belongs to a sample."""
    caplog.set_level('INFO')
    for kind, module, loader, why in (
        ('bank', Classifier(), loader_of(digits), 'each sample keeps its identity'),
        ('snapshot', Classifier(), DataLoader(Stream(digits), batch_size=20), 'samples have no index'),
        ('snapshot', Mixed(), loader_of(digits), 'samples may be mixed'),
    ):
        caplog.clear()
        callback, checkpoint = PSKD(top_k=3), pl.callbacks.ModelCheckpoint(tmp_path / kind, save_top_k=-1)
        fit(module, loader, callback, checkpoint, folder=tmp_path)
        assert callback.pskd.kind == kind
        assert f"teacher='auto' takes the {kind}" in caplog.text
        assert why in caplog.text
        assert ('top_k: no effect' in caplog.text) == (kind == 'snapshot')
    (saved,) = (tmp_path / 'snapshot').glob('*step=6.ckpt')
    resumed = PSKD()
    fit(Classifier(), loader_of(digits), resumed, ckpt_path=saved, folder=tmp_path)
    assert resumed.pskd.kind == 'snapshot'
    with pytest.raises(ValueError, match="the state is of teacher='snapshot': resume with the same teacher"):
        fit(Classifier(), loader_of(digits), PSKD(teacher='bank'), ckpt_path=saved, folder=tmp_path)


def test_the_parts_of_the_loss_are_logged(digits):
    for teacher in ('bank', 'snapshot'):
        callback, module = PSKD(alpha=0.8, teacher=teacher), Classifier()
        fit(module, loader_of(digits), callback)
        logged = {name: float(value) for name, value in module.trainer.logged_metrics.items()}
        assert logged['pskd_alpha'] == pytest.approx(0.8)
        assert logged['pskd_hard'] + logged['pskd_soft'] == pytest.approx(module.losses[-1], rel=1e-5)
        assert 0 < logged['pskd_entropy'] < 2.4


@pytest.mark.parametrize('teacher', ['snapshot', 'ema'])
def test_an_interval_is_in_steps_of_the_optimizer_and_one_epoch_is_enough(digits, teacher, tmp_path):
    alphas, how = [], dict(max_epochs=1, accumulate_grad_batches=2, folder=tmp_path)
    # Resumed within an epoch, Lightning begins its data anew: batches are alike.
    alike = loader_of(
        TensorDataset(*(part[:5].repeat(12, *[1] * (part.dim() - 1)) for part in digits.tensors)),
        batch_size=5,
        shuffle=False,
    )

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            alphas.append(round(callback.current_alpha, 6))

    callback = PSKD(alpha=0.8, teacher=teacher, interval=2)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    plain, on = Classifier(seeded=True), Classifier(seeded=True)
    fit(plain, alike, **how)
    fit(on, alike, callback, Notes(), checkpoint, **how)
    assert alphas == pytest.approx([0] * 4 + [0.8 * 2 / 6] * 4 + [0.8 * 4 / 6] * 4, abs=1e-6)
    assert on.losses[:4] == plain.losses[:4]
    assert all(a != b for a, b in zip(on.losses[4:], plain.losses[4:]))
    (saved,) = tmp_path.glob('*step=3.ckpt')
    again = PSKD(alpha=0.8, teacher=teacher, interval=2)
    resumed = Classifier(seeded=True)
    fit(resumed, alike, again, ckpt_path=saved, **how)
    assert resumed.losses == on.losses[6:]


def test_a_checkpoint_without_a_past_within_an_epoch(digits, caplog, tmp_path):
    """Plain until the next epoch."""
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    loader = loader_of(digits, shuffle=False)
    fit(Classifier(seeded=True), loader, checkpoint, folder=tmp_path)
    (saved,) = tmp_path.glob('*step=4.ckpt')
    plain, resumed = Classifier(seeded=True), Classifier(seeded=True)
    fit(plain, loader, ckpt_path=saved, folder=tmp_path)
    fit(resumed, loader, PSKD(teacher='snapshot'), ckpt_path=saved, folder=tmp_path)
    assert 'the checkpoint holds no past predictions: plain training until there are some' in caplog.text
    assert resumed.losses[:2] == plain.losses[:2]
    assert resumed.losses[2] != plain.losses[2]


def test_old_names_of_options():
    for old, value in dict(dtype=torch.float16, device='cpu').items():
        with pytest.warns(DeprecationWarning, match=f'PSKD: {old} is now called bank_{old}'):
            assert PSKD(**{old: value})._settings[f'bank_{old}'] == value


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([self.data[i] for i in range(60)])


class Fetching(Classifier):
    def training_step(self, dataloader_iter):
        return self.loss_of(next(dataloader_iter)[0])


class TwoOptimizers(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD([parameter], lr=0.1) for parameter in [*self.net.parameters()][:2]]


class TwoParts(Classifier):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)


class Stops(Classifier):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 1 else None


def test_a_step_that_is_left_out_leaves_nothing_behind(digits):
    module = fit(Stops(), loader_of(digits), PSKD())
    assert len(module.losses) == EPOCHS
    callback = PSKD()
    with pytest.raises(KeyError):
        fit(Classifier(lambda *_: {}['?']), loader_of(digits), callback)
    assert torch._C._len_torch_function_stack() == 0


def test_data_without_a_length(digits, caplog):
    """Their epochs are known by max_epochs, or by limit_train_batches."""
    stream, snapshot = DataLoader(Stream(digits), batch_size=20), lambda: PSKD(teacher='snapshot')
    with pytest.raises(ValueError, match='is not known: set max_epochs, or limit_train_batches to a number'):
        fit(Classifier(), stream, snapshot(), max_epochs=-1, max_steps=6)
    limited = snapshot()
    module = fit(Classifier(), stream, limited, max_epochs=-1, max_steps=6, limit_train_batches=2)
    assert len(module.losses) == 6
    assert limited.pskd.max_epochs == 3
    assert limited.current_alpha == pytest.approx(0.3)
    fit(Classifier(), stream, snapshot(), max_epochs=4, max_steps=9)
    assert 'where max_steps ends training earlier, it does not get there' in caplog.text


def test_an_endless_loader_has_epochs_by_limit_train_batches(digits):
    sampler = torch.utils.data.RandomSampler(digits, replacement=True, num_samples=10**9)
    endless, callback = loader_of(digits, shuffle=False, sampler=sampler), PSKD()
    fit(Classifier(), endless, callback, limit_train_batches=3)
    assert callback.current_alpha == pytest.approx(0.3)
    with pytest.raises(ValueError, match='has no past, and training ends after 1'):
        fit(Classifier(), endless, PSKD(), max_epochs=-1, max_steps=9)


def test_resumed_with_another_batch_size_alpha_still_grows_up(digits, tmp_path):
    """Under max_steps an epoch of the resumed run is another share of the training."""
    checkpoint, steps = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1), dict(max_epochs=-1, max_steps=12)
    fit(Classifier(), loader_of(digits), checkpoint, PSKD(alpha=0.5), folder=tmp_path, **steps)
    (saved,) = tmp_path.glob('*step=6.ckpt')
    resumed = PSKD(alpha=0.5)
    fit(Classifier(), loader_of(digits, batch_size=30), resumed, ckpt_path=saved, folder=tmp_path, **steps)
    assert resumed.pskd.max_epochs == 6
    assert resumed.current_alpha == pytest.approx(0.5)


def under_fabric(data, rank):
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy as FabricDDP

    fabric = Fabric(accelerator='cpu', devices=2, strategy=FabricDDP(process_group_backend='gloo'))
    fabric.launch()
    model = Classifier().net
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(1)
    loader = loader_of(data, batch_size=10)
    with pytest.raises(TypeError, match='DataLoader'):
        fabric.setup_dataloaders(selfkd_torch.PSKD(loader, max_epochs=2).batches())
    pskd = selfkd_torch.PSKD(fabric.setup_dataloaders(loader), alpha=0.8, max_epochs=2)
    rows = []
    for _ in range(2):
        for x, y in pskd.batches():
            assert torch.equal(x, torch.stack([data[row][0] for row in pskd._rows]))
            rows.append(pskd._rows)
            fabric.backward(pskd.loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return dict(rows=torch.cat(rows), bank=pskd.bank.state_dict())


def test_two_processes_under_fabric(digits, tmp_path):
    """Each trains on its half, and they hold one bank."""
    one, two = in_processes(tmp_path, lambda rank: under_fabric(digits, rank), 2)
    assert sorted([*one['rows'][:30].tolist(), *two['rows'][:30].tolist()]) == list(range(60))
    assert len(one['rows']) == 60
    assert torch.equal(one['bank']['values'], two['bank']['values'])
    assert bool(one['bank']['seen'].all())


def test_what_cannot_work_is_refused(digits):
    loader, stream = loader_of(digits), DataLoader(Stream(digits), batch_size=20)
    snapshot = PSKD(teacher='snapshot')
    for error, message, how in (
        (ValueError, 'has no past, and training ends after 1', dict(max_epochs=1)),
        (ValueError, 'has no past, and training ends after 1', dict(max_steps=3)),
        (ValueError, 'set max_epochs or max_steps', dict(max_epochs=-1)),
        (ValueError, "IterableDataset, whose samples have no index: use teacher='snapshot', which needs no rows",
         dict(loader=stream, callback=PSKD(teacher='bank'))),
        (ValueError, 'limit_train_batches', dict(loader=stream, callback=PSKD(teacher='ema', interval=2))),
        (ValueError, 'samples may be mixed', dict(module=Mixed(), callback=PSKD(teacher='bank'))),
        (ValueError, r'from one DataLoader \(of a ConcatDataset\)', dict(loader=[loader, loader])),
        (ValueError, r'from one DataLoader \(of a ConcatDataset\)',
         dict(loader=dict(a=loader, b=loader_of(Subset(digits, range(20)))), callback=PSKD(teacher='bank'))),
        (ValueError, 'counts those of all 2 optimizers',
         dict(module=TwoOptimizers(), callback=PSKD(teacher='snapshot', interval=2))),
        (ValueError, r'training_step\(dataloader_iter\) fetches', dict(module=Fetching())),
        (ValueError, r"but there are \['net', 'head'\]", dict(module=TwoParts(), callback=snapshot)),
        (ValueError, 'compile the network inside', dict(module=torch.compile(Classifier(), backend='eager'))),
        (RuntimeError, 'a batch was trained on without', dict(module=Classifier(OwnLoss()))),
        (RuntimeError, 'of the logits that TwoParts.head gives', dict(module=TwoParts(), callback=PSKD(
            teacher='snapshot', model='head'))),
        (RuntimeError, 'a second loss in one batch', dict(module=Classifier(
            lambda x, y: F.cross_entropy(x, y) + F.cross_entropy(x, y)))),
    ):  # fmt: skip
        how = {'module': Classifier(), 'loader': loader, 'callback': PSKD(), **how}
        with pytest.raises(error, match=message):
            fit(how.pop('module'), how.pop('loader'), how.pop('callback'), **how)
    with pytest.raises(RuntimeError, match='more than one stateful callback'):
        fit(Classifier(), loader, PSKD(), PSKD())
    with pytest.raises(ValueError, match=r'alpha must lie in \[0, 1\], got 2'):
        PSKD(alpha=2)
    for options in (
        dict(teacher='bank', model='net'),
        dict(teacher='snapshot', top_k=2),
        dict(teacher='snapshot', ema_decay=0.9),
    ):
        with pytest.raises(ValueError, match='would do nothing: remove'):
            PSKD(**options)
    with pytest.raises(RuntimeError, match='the loss is for training_step'):
        PSKD().loss(torch.zeros(1, 2), torch.zeros(1).long())
    assert len(fit(Classifier(), stream, snapshot).losses) == 9
    assert len(fit(Classifier(), loader, PSKD(), fast_dev_run=True).losses) == 1
    assert copy.deepcopy(snapshot).teacher == 'snapshot'


class OnImages(Classifier):
    """With its data normalised on the device, as Lightning's hooks for batches are for."""

    def __init__(self):
        super().__init__(seeded=True)
        torch.manual_seed(0)
        stage = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())  # noqa: E731
        self.net = nn.Sequential(stage(1, 4), stage(4, 8), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 10))
        self.example_input_array = torch.zeros(1, 1, 8, 8)


def test_cskd_and_frskd_and_pskd_in_one_trainer_are_those_of_a_plain_loop(digits):
    x, y = digits.tensors
    data = TensorDataset(x.view(-1, 1, 8, 8), y)
    callbacks = [CSKD(0.5, labels=y), FRSKD(beta=10.0), PSKD(alpha=0.8)]
    module = fit(OnImages(), loader_of(data, shuffle=False), *callbacks)
    other = OnImages()
    torch.manual_seed(1)
    frskd = selfkd_torch.FRSKD(other.net, ['0', '1'], 10, beta=10.0, example=torch.zeros(1, 1, 8, 8))
    cskd = selfkd_torch.CSKD(loader_of(data, shuffle=False), other.net, weight=0.5, labels=y)
    pskd = selfkd_torch.PSKD(cskd.batches(), max_epochs=EPOCHS, alpha=0.8)
    optimizer = torch.optim.SGD([*other.net.parameters(), *frskd.parameters()], lr=0.2, momentum=0.9)
    losses = []
    for _ in range(EPOCHS):
        for x, y in pskd.batches():
            torch.manual_seed(len(losses))
            logits = other.net(x)
            loss = pskd.loss(logits, y) + cskd.term(logits, y) + frskd.term(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert callbacks[1].frskd.layers == frskd.layers
    torch.testing.assert_close(callbacks[1].frskd.state_dict(), frskd.state_dict(), rtol=1e-3, atol=1e-4)
    assert module.losses == pytest.approx(losses, rel=1e-3)


class Normalises(OnImages):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return 2 * batch[0], batch[1]


class NormalisesInTheStep(OnImages):
    def loss_of(self, batch):
        return super().loss_of((2 * batch[0], batch[1]))


@pytest.mark.parametrize(
    ('module', 'callback', 'problem'),
    [
        (Classifier(), lambda y: CSKD(), 'CSKD: .* TensorDataset has no attribute targets'),
        (NormalisesInTheStep(), lambda y: CSKD(labels=y), 'CSKD: .* must be done with the partners as well'),
        (Classifier(), lambda y: FRSKD(example=torch.zeros(2, 64)), 'FRSKD: .* give 0 .* name modules as layers='),
        (Classifier(LogSoftmaxLoss()), lambda y: CSKD(labels=y), r"CSKD: .* CSKD\(loss='criterion'\)"),
    ],
)
def test_what_cskd_and_frskd_cannot_serve_is_refused(digits, module, callback, problem):
    x, y = digits.tensors
    data = TensorDataset(x.view(-1, 1, 8, 8), y) if isinstance(module, OnImages) else digits
    with pytest.raises((RuntimeError, ValueError), match=problem):
        fit(module, loader_of(data), callback(y))


@pytest.mark.parametrize(
    ('module', 'options'),
    [(Normalises(), {}), (NormalisesInTheStep(), dict(inputs=lambda batch: 2 * batch[0]))],
)
def test_partners_get_what_the_batch_gets(digits, module, options):
    x, y = digits.tensors
    data = TensorDataset(x.view(-1, 1, 8, 8), y)
    fit(module, loader_of(data), CSKD(labels=y, **options), max_epochs=1)
