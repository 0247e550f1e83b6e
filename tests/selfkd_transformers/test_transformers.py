"""Self-distillation under transformers' own Trainer; models are built from configs, nothing is downloaded."""

import copy
import os
from dataclasses import dataclass

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch
import torch.nn.functional as F
from helpers.processes import in_processes
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, IterableDataset

transformers = pytest.importorskip('transformers', reason='transformers is not installed')
pytest.importorskip('accelerate', reason='accelerate is not installed')

from transformers import Trainer, TrainingArguments  # noqa: E402

from selfkd_torch import PSKD  # noqa: E402
from selfkd_transformers import PSKDArguments, PSKDMixin, PSKDTrainingArguments  # noqa: E402
from selfkd_transformers.numbered import _Numbered  # noqa: E402

EPOCHS, SAMPLES = 3, 24


class MyTrainer(PSKDMixin, Trainer):
    """What a user writes; and it keeps the loss of every step."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, 'losses', []), loss.item()]
        return loss


class Plain(Trainer):
    training_step = lambda self, *args, **kwargs: _noted(self, Trainer.training_step(self, *args, **kwargs))  # noqa: E731


def _noted(trainer, loss):
    trainer.losses = [*getattr(trainer, 'losses', []), loss.item()]
    return loss


class Texts(Dataset):
    """Token ids in rows of different lengths, drawn once; the label is in them. ``unused`` is a column that no model
    takes."""

    def __init__(self, kind, count=SAMPLES):
        random = torch.Generator().manual_seed(0)
        self.samples = []
        for i in range(count):
            length = int(torch.randint(4, 9, (), generator=random))
            ids = torch.randint(3, 20, (length,), generator=random)
            labels = {'class': int(ids[0]) % 3, 'tokens': (ids % 5).tolist(), 'language': ids.tolist()}[kind]
            self.samples.append(dict(input_ids=ids.tolist(), labels=labels, unused='?', index=i))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return dict(self.samples[index])


class Images(Dataset):
    def __init__(self):
        scans = load_digits()
        self.images = torch.tensor(scans.images[:SAMPLES], dtype=torch.float32)[:, None] / 16
        self.labels = scans.target[:SAMPLES].tolist()

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return dict(pixel_values=self.images[index], labels=self.labels[index], unused=object())


def pad(features):
    """A collate function of the user's own, that pads on the left: a token's place in the batch changes."""
    length = max(len(feature['input_ids']) for feature in features)
    whole = isinstance(features[0]['labels'], int)
    fill = lambda values, by: [by] * (length - len(values)) + values  # noqa: E731
    return dict(
        input_ids=torch.tensor([fill(feature['input_ids'], 0) for feature in features]),
        attention_mask=torch.tensor([fill([1] * len(feature['input_ids']), 0) for feature in features]),
        labels=torch.tensor([feature['labels'] if whole else fill(feature['labels'], -100) for feature in features]),
    )


def pad_pairs(features):
    """And what the decoder is fed with, as DataCollatorForSeq2Seq does."""
    batch = pad(features)
    return dict(batch, decoder_input_ids=F.pad(batch['labels'].clamp(min=0), (1, 0))[:, :-1])


BERT = dict(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=16,
)  # fmt: skip
TASKS = {
    'text': lambda t: (t.BertForSequenceClassification(t.BertConfig(**BERT, num_labels=3)), Texts('class')),
    'image': lambda t: (
        t.ViTForImageClassification(
            t.ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=16, num_labels=10, hidden_dropout_prob=0.1)
        ),
        Images(),
    ),
    'tokens': lambda t: (t.BertForTokenClassification(t.BertConfig(**BERT, num_labels=5)), Texts('tokens')),
    'language': lambda t: (
        t.GPT2LMHeadModel(t.GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)),
        Texts('language'),
    ),
    'answers': lambda t: (t.BertForQuestionAnswering(t.BertConfig(**BERT)), Answers()),
    'translation': lambda t: (
        t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=24, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
        Texts('tokens'),
    ),
}  # fmt: skip


def make(kind, task, folder, data=None, model=None, arguments=PSKDTrainingArguments, trainer=None, **options):
    torch.manual_seed(0)
    own_model, own_data = TASKS[task](transformers)
    settings = {k: options.pop(k) for k in [*options] if k in ('callbacks', 'compute_loss_func')}
    settings['eval_dataset'] = options.pop('evaluated', None)
    collator = options.pop('collator', {'image': None, 'translation': pad_pairs, 'answers': pad_answers}.get(task, pad))
    quiet = dict(
        output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=6, learning_rate=0.01, seed=3,
        report_to='none', disable_tqdm=True, save_strategy='no', logging_strategy='no', use_cpu=True,
        lr_scheduler_type='constant',
    )  # fmt: skip
    return (trainer or {'plain': Plain, 'pskd': MyTrainer}[kind])(
        model=model or own_model,
        args=(TrainingArguments if kind == 'plain' else arguments)(**{**quiet, **options}),
        train_dataset=data or own_data,
        data_collator=collator,
        **settings,
    )


def fit(kind, task, folder, resume=None, **options):
    trainer = make(kind, task, folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values()))


@pytest.mark.parametrize('options', [
    {},
    dict(gradient_accumulation_steps=3, dataloader_num_workers=1),
    dict(label_smoothing_factor=0.1, bf16=True, gradient_accumulation_steps=2),
], ids=['', 'accumulation', 'smoothing'])  # fmt: skip
@pytest.mark.parametrize('teacher', ['bank', 'snapshot'])
@pytest.mark.parametrize('task', [task for task in TASKS if task != 'answers'])
def test_the_first_epoch_is_plain_and_the_next_ones_are_not(task, teacher, options, tmp_path):
    """What the Trainer divides the loss by is as it was: only so do the steps of the first epoch agree."""
    plain = fit('plain', task, tmp_path, **options)
    trainer = fit('pskd', task, tmp_path, pskd_alpha=0.8, pskd_teacher=teacher, **options)
    steps = SAMPLES // 6
    assert len(plain.losses) == EPOCHS * steps
    assert trainer.losses[:steps] == pytest.approx(plain.losses[:steps], rel=2e-3 if options.get('bf16') else 1e-5)
    assert all(abs(a - b) > 1e-5 for a, b in zip(trainer.losses[steps:], plain.losses[steps:]))
    assert trainer.pskd.current_alpha == pytest.approx(0.8)
    zero = fit('pskd', task, tmp_path, pskd_alpha=0.0, pskd_teacher=teacher, **options)
    assert zero.losses == plain.losses
    assert same(zero, plain)


class Keeps(MyTrainer):
    """Keeps logits and labels of each sample of the last epoch, by the sample's own index."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits, labels = outputs['logits'].detach(), inputs['labels']
        shift = 1 if logits.shape[-1] == 20 else 0
        past = self.__dict__.setdefault('past', {})
        terms, count = [], 0
        for which, row, label in zip(self.pskd._rows.tolist(), logits, labels):
            if label.dim():
                row, label = row[: len(row) - shift][label[shift:] != -100], label[shift:][label[shift:] != -100]
            else:
                row, label = row[None], label[None]
            target = F.one_hot(label, row.shape[1]).float()
            known = min(len(past.get(which, ())), len(target))  # left-padded, a text's first token is predicted, too
            if known:
                alpha, old = self.pskd.current_alpha, past[which]
                target[-known:] = (1 - alpha) * target[-known:] + alpha * old[-known:]
            terms.append(-(target * row.log_softmax(-1)).sum())
            count += len(label)
            past[which] = torch.cat(
                [past.get(which, row)[: max(0, len(past.get(which, ())) - len(row))], row.softmax(-1)]
            )
        count = count if num_items_in_batch is None or not self.model_accepts_loss_kwargs else num_items_in_batch
        self.expected = [*getattr(self, 'expected', []), (sum(terms) / count).item()]
        self.got = [*getattr(self, 'got', []), loss.item()]
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize('task', [task for task in TASKS if task != 'answers'])
def test_it_is_the_papers_loss(task, tmp_path):
    """Each sample, or each token of it, learns from what was predicted for it in the last epoch."""
    options = dict(pskd_top_k={'language': 20, 'translation': 24}[task]) if task in ('language', 'translation') else {}
    trainer = fit('pskd', task, tmp_path, pskd_alpha=0.8, trainer=Keeps, **options)
    assert trainer.got == pytest.approx(trainer.expected, rel=1e-5 if task in ('text', 'image') else 1e-3)
    bank = trainer.pskd.bank
    rows = {'text': SAMPLES, 'image': SAMPLES}.get(task, sum(len(s['input_ids']) for s in Texts('class').samples))
    assert bank.num_samples == rows
    assert int(bank.seen(torch.arange(rows)).sum()) == sum(len(past) for past in trainer.past.values())


@pytest.mark.parametrize('task', ['language', 'translation'])
def test_tokens_in_batches_with_one_label_for_each_sample(task, tmp_path):
    """The first text and the last have a single label that counts, and each is a batch of its own."""
    data = Texts('language', count=6)
    for sample in data.samples[::5]:
        for name in ('input_ids', 'labels'):
            sample[name] = sample[name][: 2 if task == 'language' else 1]
    options = dict(data=data, per_device_train_batch_size=1, pskd_top_k={'language': 20, 'translation': 24}[task])
    trainer = fit('pskd', task, tmp_path, trainer=Keeps, **options)
    assert trainer.got == pytest.approx(trainer.expected, rel=1e-3)
    assert trainer.pskd.bank.num_samples == sum(len(sample['labels']) for sample in data.samples)


@pytest.mark.parametrize('when', ['epoch', 'steps', 'last step'])
@pytest.mark.parametrize(
    ('task', 'teacher'), [('text', 'bank'), ('language', 'bank'), ('language', 'snapshot'), ('text', 'ema')]
)
def test_resume_is_exact(task, teacher, when, tmp_path):
    """From a checkpoint of the end of an epoch, of two steps later, and of an epoch's last step, before it is over."""
    how = dict(save_strategy='epoch', pskd_teacher=teacher, save_total_limit=1)
    if when != 'epoch':
        how.update(save_strategy='steps', save_steps=6 if when == 'steps' else 4, save_total_limit=None)
    straight = fit('pskd', task, tmp_path, **how)
    saved = sorted(path.name for path in tmp_path.glob('checkpoint-*/selfkd.pt'))
    assert len(saved) == {'epoch': 1, 'steps': 2, 'last step': 3}[when]  # removed with its checkpoint
    if when == 'epoch':
        stops = fit('pskd', task, tmp_path / 'stops', **how, callbacks=[StopAt(8)])
        assert stops.state.global_step == 8
        resumed = fit('pskd', task, tmp_path / 'stops', resume=True, **how)
        done = 8
    else:
        done = 6 if when == 'steps' else 8
        resumed = fit('pskd', task, tmp_path, resume=str(tmp_path / f'checkpoint-{done}'), **how)
    assert resumed.losses == straight.losses[done:]
    assert same(resumed, straight)


@pytest.mark.parametrize('teacher', ['bank', 'snapshot'])
def test_resume_is_exact_where_max_steps_ends_within_an_epoch(teacher, tmp_path):
    """A saved step late in the second of 2.5 epochs."""
    how = dict(save_strategy='steps', save_steps=7, max_steps=10, pskd_teacher=teacher)
    straight = fit('pskd', 'text', tmp_path, **how)
    resumed = fit('pskd', 'text', tmp_path, resume=str(tmp_path / 'checkpoint-7'), **how)
    assert resumed.losses == straight.losses[7:]
    assert same(resumed, straight)


def test_a_save_that_fails_leaves_the_past_that_was_saved_before(tmp_path, monkeypatch):
    trainer = fit('pskd', 'text', tmp_path, save_strategy='epoch')
    folder = max(tmp_path.glob('checkpoint-*'))
    saved = (folder / 'selfkd.pt').read_bytes()

    def full(value, path, save=torch.save, **options):
        if 'selfkd' in str(path):
            with open(path, 'wb') as file:
                file.write(b'half')
            raise RuntimeError('unexpected pos')
        return save(value, path, **options)

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='selfkd.pt: could not be written: unexpected pos'):
        trainer._save_optimizer_and_scheduler(str(folder))
    assert (folder / 'selfkd.pt').read_bytes() == saved


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class Distributed(MyTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.rows = [*getattr(self, 'rows', []), torch.tensor(inputs['selfkd_rows'])]
        return super().training_step(model, inputs, *args, **kwargs)


def distributed(folder, task):
    options = dict(per_device_train_batch_size=3, ddp_backend='gloo', save_strategy='steps', save_steps=2)
    trainer = fit('pskd', task, folder, trainer=Distributed, **options)
    return dict(
        bank=trainer.pskd.bank.state_dict(),
        rows=torch.cat(trainer.rows[:4]),
        weights={name: value.clone() for name, value in trainer.model.state_dict().items()},
    )


@pytest.mark.parametrize('task', ['text', 'language'])
def test_two_processes_hold_one_bank(task, tmp_path):
    one, two = in_processes(tmp_path, lambda rank: distributed(tmp_path, task), 2)
    assert sorted([*one['rows'].tolist(), *two['rows'].tolist()]) == list(
        range(SAMPLES)
    )  # Accelerate's sharded sampler
    for part in ('bank', 'weights'):
        for name, value in one[part].items():
            other = two[part][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    seen = torch.load(tmp_path / 'checkpoint-2' / 'selfkd.pt', weights_only=True)['PSKD']['bank']['seen']
    if task == 'language':
        lengths = [len(sample['input_ids']) for sample in Texts(task).samples]
        seen = torch.stack([tokens.any() for tokens in seen.split(lengths)])
    assert int(seen.sum()) == 2 * 3 * 2  # of both processes, though saved within an epoch


def under_accelerate(rank):
    from accelerate import Accelerator

    data = [(torch.full((3,), float(i)), i % 2) for i in range(SAMPLES)]
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(3, 2)
    plain = torch.utils.data.DataLoader(data, 3, shuffle=True)
    wrong = PSKD(plain, max_epochs=2)
    with pytest.raises(ValueError, match='prepare the loader first'):
        next(iter(accelerator.prepare(wrong.batches())))
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), plain)
    pskd, rows = PSKD(loader, alpha=0.8, max_epochs=2), []
    for _ in range(2):
        for x, y in pskd.batches():
            assert x[:, 0].tolist() == pskd._rows.tolist()
            rows += pskd._rows.tolist()
            accelerator.backward(pskd.loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return dict(rows=rows, bank=pskd.bank.state_dict())


def test_two_processes_under_accelerate(tmp_path):
    """Each trains on its half, and they hold one bank."""
    one, two = in_processes(tmp_path, under_accelerate, 2)
    half = SAMPLES // 2
    assert sorted(one['rows'][:half] + two['rows'][:half]) == list(range(SAMPLES))
    assert len(one['rows']) == len(two['rows']) == SAMPLES
    assert torch.equal(one['bank']['values'], two['bank']['values'])
    assert bool(one['bank']['seen'].all())


class OwnLoss(MyTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop('labels')
        return F.cross_entropy(model(**inputs).logits, labels)


def test_a_loss_of_ones_own_samplers_and_evaluation(tmp_path):
    ours = fit('pskd', 'text', tmp_path)
    own = fit('pskd', 'text', tmp_path, trainer=OwnLoss)
    assert own.losses == pytest.approx(ours.losses, rel=1e-5)
    func = fit('pskd', 'text', tmp_path, compute_loss_func=lambda out, y, num_items_in_batch: F.cross_entropy(
        out['logits'], y, reduction='sum') / num_items_in_batch)  # fmt: skip
    assert func.losses == pytest.approx(ours.losses, rel=1e-5)
    ordered = fit('pskd', 'text', tmp_path, train_sampling_strategy='group_by_length', eval_strategy='no')
    assert len(ordered.losses) == EPOCHS * 4
    before = ordered.pskd.bank.state_dict()['values']
    assert ordered.evaluate(Texts('class'))['eval_loss'] > 0
    assert torch.equal(ordered.pskd.bank.state_dict()['values'], before)
    again = len(ordered.losses)
    ordered.train()  # anew
    assert len(ordered.losses) == 2 * again


def backwards(features):
    return pad(features[::-1])


def test_samples_that_are_moved_within_a_batch_are_refused(tmp_path):
    """As a collator does that sorts by length: what was predicted would be another sample's, or another token's."""
    with pytest.raises(ValueError, match='the samples of a batch are not those that the sampler chose'):
        fit('pskd', 'text', tmp_path, collator=backwards)
    with pytest.raises(ValueError, match='not those that the sampler chose|more labels than'):
        fit('pskd', 'tokens', tmp_path, collator=backwards)


class Answering(MyTrainer):
    """Computes the loss again: start and end learn each from what a copy of the last epoch's model predicts."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.state.epoch == int(self.state.epoch):  # an epoch begins
            self.copies = [*getattr(self, 'copies', []), copy.deepcopy(self.model.state_dict())]
        plain, alpha = [], self.pskd.current_alpha
        with torch.no_grad():
            past = TASKS['answers'](transformers)[0].eval()
            past.load_state_dict(self.copies[-1])
            past = past(**{k: v for k, v in inputs.items() if 'positions' not in k})
            for name in ('start', 'end'):
                logits, label = outputs[f'{name}_logits'], inputs[f'{name}_positions']
                hard = F.cross_entropy(logits, label)
                soft = F.cross_entropy(logits, past[f'{name}_logits'].softmax(1))
                plain.append(hard if len(self.copies) == 1 else (1 - alpha) * hard + alpha * soft)
        self.expected = [*getattr(self, 'expected', []), (sum(plain) / 2).item()]
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize('teacher', ['auto', 'snapshot'])
def test_question_answering_has_a_past_for_the_start_and_one_for_the_end(teacher, tmp_path):
    how = dict(pskd_alpha=0.8, pskd_teacher=teacher, pskd_teacher_mode='eval')
    trainer = fit('pskd', 'answers', tmp_path, trainer=Answering, **how)
    assert trainer.losses == pytest.approx(trainer.expected, rel=1e-5)
    assert trainer.pskd.current_alpha == pytest.approx(0.8)
    assert trainer.pskd.kind == 'snapshot'


class TwoViews(OwnLoss):
    """Calls the model on another view as well, before the loss of the first."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop('labels')
        logits = model(**inputs).logits
        with torch.random.fork_rng():
            model(input_ids=inputs['input_ids'].flip(1))
        return F.cross_entropy(logits, labels)


def test_a_loss_belongs_to_its_forward_pass(tmp_path):
    one, two = (fit('pskd', 'text', tmp_path, trainer=kind, pskd_teacher='snapshot') for kind in (OwnLoss, TwoViews))
    assert two.losses == one.losses


class Looks(transformers.TrainerCallback):
    """Computes losses beside training_step, with gradients, of a part of a batch."""

    def __init__(self):
        self.batch, self.losses = pad([Texts('class')[i] for i in range(5)]), []

    def look(self, args, state, control, model=None, **kwargs):
        training, _ = model.training, model.eval()
        with torch.no_grad():
            plain = model(**self.batch).loss
        with torch.enable_grad():
            self.losses.append((model(**self.batch).loss - plain).item())
        model.train(training)

    on_step_begin = on_step_end = on_prediction_step = look


@pytest.mark.parametrize('teacher', ['bank', 'snapshot'])
def test_what_is_computed_beside_training_step_is_plain(teacher, tmp_path):
    look, data = Looks(), Texts('class')
    options = dict(pskd_teacher=teacher, eval_strategy='steps', eval_steps=3)
    trainer = fit('pskd', 'text', tmp_path, callbacks=[look], evaluated=data, **options)
    assert trainer.losses == fit('pskd', 'text', tmp_path, evaluated=data, **options).losses
    assert len(look.losses) > 2 * len(trainer.losses)
    assert max(map(abs, look.losses)) < 1e-6
    logged = [entry['eval_loss'] for entry in trainer.state.log_history if 'eval_loss' in entry]
    assert len(logged) == 4
    assert trainer.evaluate()['eval_loss'] == pytest.approx(logged[-1])


def test_the_mixin_comes_before_the_trainer():
    with pytest.raises(TypeError, match=r'class Wrong\(PSKDMixin, Trainer\)'):

        class Wrong(Trainer, PSKDMixin):
            pass


def test_the_arguments_are_for_a_trainer_with_the_mixin(tmp_path):
    """A Trainer without it would train plainly; one that only evaluates may have them."""
    with pytest.raises(ValueError, match=r'args ask for it \(pskd_alpha=0.3\), but Plain would train without it'):
        make('pskd', 'text', tmp_path, trainer=Plain, pskd_alpha=0.3)
    with pytest.raises(ValueError, match=r'args ask for it .* but Plain would train without it'):
        make('pskd', 'text', tmp_path, trainer=Plain)  # with its default
    plain = make('plain', 'text', tmp_path)
    off = make('pskd', 'text', tmp_path, trainer=Plain, pskd_alpha=0.0)
    on = PSKDTrainingArguments(output_dir=str(tmp_path), report_to='none', use_cpu=True)
    assert Plain(model=plain.model, args=on, data_collator=pad).evaluate(Texts('class'))['eval_loss'] > 0
    assert off.args.train_batch_size == plain.args.train_batch_size == 6


def test_resumed_with_another_batch_size_alpha_still_grows_up(tmp_path):
    """The Trainer counts the steps that were done in epochs of the new length."""
    how = dict(num_train_epochs=4, pskd_alpha=0.5)
    stops = fit('pskd', 'text', tmp_path, callbacks=[StopAt(4)], save_strategy='epoch', **how)
    assert stops.pskd.current_alpha == pytest.approx(0.5 / 4)
    for batch, alphas in ((12, [0.375, 0.5]), (3, [0.125, 0.25, 0.375, 0.5]), (6, [0.25, 0.375, 0.5])):
        notes = Alphas()
        resumed = make('pskd', 'text', tmp_path, callbacks=[notes], **{**how, 'per_device_train_batch_size': batch})
        notes.trainer = resumed
        resumed.train(resume_from_checkpoint=str(tmp_path / 'checkpoint-4'))
        assert notes.alphas == pytest.approx(alphas)


class Alphas(transformers.TrainerCallback):
    def __init__(self):
        self.trainer, self.alphas = None, []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.alphas.append(self.trainer.pskd.current_alpha)


def test_a_training_that_may_end_early_is_told_of(tmp_path, caplog):
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=9)
    best = dict(load_best_model_at_end=True, metric_for_best_model='loss', eval_strategy='epoch', save_strategy='epoch')
    fit('pskd', 'text', tmp_path, callbacks=[stop], evaluated=Texts('class'), **best)
    assert 'where EarlyStoppingCallback ends training earlier, it does not get there' in caplog.text


def weighted(trainer):
    """The usual recipe for data out of balance."""
    data = trainer.train_dataset
    sampler = torch.utils.data.WeightedRandomSampler(torch.arange(1.0, SAMPLES + 1), 18, replacement=False)
    return torch.utils.data.DataLoader(data, 6, sampler=sampler, collate_fn=pad)


class OwnLoader(Keeps):
    get_train_dataloader = weighted


class OwnPreparedLoader(Keeps):
    def get_train_dataloader(self):
        return self.accelerator.prepare(weighted(self))


class OwnKeptLoader(Keeps):
    def get_train_dataloader(self):
        self.loader = getattr(self, 'loader', None) or weighted(self)
        return self.loader


@pytest.mark.parametrize('trainer', [OwnLoader, OwnPreparedLoader, OwnKeptLoader])
def test_a_loader_of_ones_own(trainer, tmp_path):
    """Its batches are trained on, each sample with its own past."""
    done = fit('pskd', 'text', tmp_path, trainer=trainer)
    assert done.got == pytest.approx(done.expected, rel=1e-5)
    assert 0 < int(done.pskd.bank.seen(torch.arange(SAMPLES)).sum()) < SAMPLES
    done.past.clear()  # a second training begins anew
    done.train()
    assert done.got == pytest.approx(done.expected, rel=1e-5)


class Marks(Texts):
    mark = 0

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return dict(sample, input_ids=[self.mark, *sample['input_ids'][1:]])


def mark(worker):
    torch.utils.data.get_worker_info().dataset.mark = 1 + worker


class Workers(MyTrainer):
    def get_train_dataloader(self):
        options = dict(num_workers=2, worker_init_fn=mark, collate_fn=self.note)
        return torch.utils.data.DataLoader(self.train_dataset, 6, **options)

    def note(self, features):
        return {**pad(features), 'marks': [feature['input_ids'][0] for feature in features]}

    def training_step(self, model, inputs, *args, **kwargs):
        self.marks = getattr(self, 'marks', set()) | set(inputs.pop('marks'))
        return super().training_step(model, inputs, *args, **kwargs)


def test_what_is_set_on_the_loaders_data_set_arrives_there(tmp_path):
    """By a worker_init_fn, or in the training process."""
    data = Marks('class')
    trainer = fit('pskd', 'text', tmp_path, trainer=Workers, data=data)
    assert trainer.marks == {1, 2}
    trainer.callback_handler.train_dataloader.dataset.mark = 7
    assert data.mark == 7


class Forgets(MyTrainer):
    """A training step that does not call the one that it overrides."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs.pop('selfkd_rows', None)
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


class Cuts(MyTrainer):
    """A loader that makes new batches of the collator's."""

    def get_train_dataloader(self):
        class Loader(torch.utils.data.DataLoader):
            def __iter__(self):
                for batch in super().__iter__():
                    yield {name: batch[name] for name in ('input_ids', 'attention_mask', 'labels')}

        return Loader(self.train_dataset, 6, collate_fn=pad)


class Shifts(MyTrainer):
    """A causal loss of logits that are cut, which the past's are not."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop('labels')
        logits = model(**inputs).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


class Answers(Texts):
    def __init__(self):
        super().__init__('class')
        for sample in self.samples:
            sample.update(start_positions=0, end_positions=sample.pop('labels'))


def pad_answers(features):
    batch = pad([dict(feature, labels=0) for feature in features])
    del batch['labels']
    positions = ('start_positions', 'end_positions')
    return dict(batch, **{name: torch.tensor([feature[name] for feature in features]) for name in positions})


class Masked(Texts):
    """Other labels each time, as in masked language modelling."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return dict(sample, labels=[y if torch.rand(()) < 0.5 else -100 for y in sample['labels']])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Texts('class').samples)


class Counted(Stream):
    def __len__(self):
        return SAMPLES


class Silent(MyTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs['input_ids']).logits.square().mean()


def join(features):
    """As padding-free collators do: one row of all samples."""
    batch = {name: [value for f in features for value in f[name]] for name in ('input_ids', 'labels')}
    return {name: torch.tensor([values[:12]]) for name, values in batch.items()}


def test_what_cannot_work_is_refused(tmp_path):
    class Joining(MyTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.data_collator = join

    for error, message, task, how in (
        (ValueError, 'pskd_alpha must lie in .0, 1., got 2', 'text', dict(pskd_alpha=2.0)),
        (ValueError, "pskd_teacher must be one of .*, got 'mean'", 'text', dict(pskd_teacher='mean')),
        (ValueError, "with pskd_teacher='snapshot' pskd_top_k would do nothing", 'text',
         dict(pskd_teacher='snapshot', pskd_top_k=2)),
        (ValueError, r'args must be PSKDTrainingArguments .*, got TrainingArguments', 'text',
         dict(arguments=TrainingArguments)),
        (ValueError, 'torch_compile cannot be used here', 'text', dict(torch_compile=True)),
        (ValueError, 'dispatch_batches cannot be used here', 'text',
         dict(accelerator_config=dict(dispatch_batches=True))),
        (ValueError, 'no past, and training ends after 1, .* raise num_train_epochs', 'text', dict(num_train_epochs=1)),
        (ValueError, 'ends after 1, .* raise num_train_epochs or max_steps', 'text', dict(max_steps=4)),
        (ValueError, "a Stream, whose samples have no index: use pskd_teacher='snapshot'", 'text',
         dict(data=Stream(), max_steps=6, pskd_teacher='bank')),
        (ValueError, 'max_steps comes to is not known of data without a length.*give the data set a __len__', 'text',
         dict(data=Stream(), max_steps=6, pskd_teacher='snapshot')),
        (ValueError, "are not those that the sampler chose.*pskd_teacher='snapshot'", 'language',
         dict(data=Masked('language'), pskd_teacher='bank')),
        (ValueError, 'tokens for 6 samples: joined into one', 'language',
         dict(trainer=Joining, pskd_teacher='bank')),
        (RuntimeError, 'a batch was trained on without', 'text', dict(trainer=Silent)),
        (RuntimeError, 'Forgets.training_step must call super', 'text', dict(trainer=Forgets)),
        (RuntimeError, 'Forgets.training_step must call super', 'text', dict(trainer=Forgets, pskd_teacher='snapshot')),
        (RuntimeError, 'a batch came without selfkd_rows', 'text', dict(trainer=Cuts)),
        (ValueError, "a sample has two labels, .*use pskd_teacher='snapshot'", 'answers', dict(pskd_teacher='bank')),
        (ValueError, "or use pskd_teacher='bank'", 'language', dict(trainer=Shifts, pskd_teacher='snapshot')),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fit('pskd', task, tmp_path, **how)


@dataclass
class Masks:
    """As DataCollatorForLanguageModeling; the real one wants a tokenizer."""

    mlm: bool = True

    def __call__(self, features):
        batch = pad(features)
        hidden = torch.rand(batch['labels'].shape) < 0.5
        return dict(batch, labels=batch['labels'].masked_fill(~hidden, -100))


class Soft(OwnLoss):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = F.one_hot(inputs.pop('labels'), 3).float()
        return F.cross_entropy(model(**inputs).logits, labels)


def test_auto_always_has_a_past(tmp_path, caplog):
    caplog.set_level('INFO')
    for kind, task, why, how in (
        ('bank', 'text', 'each sample keeps its identity', {}),
        ('bank', 'language', 'each sample keeps its identity', {}),
        ('snapshot', 'text', 'a Counted, whose samples have no index', dict(data=Counted())),
        ('snapshot', 'language', 'Masks masks other tokens each time', dict(collator=Masks())),
        ('snapshot', 'text', 'samples may be mixed', dict(trainer=Soft)),
        ('snapshot', 'language', 'joined into one', dict(collator=join)),
    ):
        caplog.clear()
        trainer = fit('pskd', task, tmp_path, **how)
        assert trainer.pskd.kind == kind
        assert f"teacher='auto' takes the {kind}" in caplog.text
        assert why in caplog.text
        assert trainer.pskd.alpha == 0.3
        assert trainer.pskd.logs['pskd_alpha'] == pytest.approx(trainer.pskd.alpha)
        assert trainer.pskd.logs['pskd_entropy'] > 0
    fit('pskd', 'text', tmp_path, save_strategy='epoch')
    with pytest.raises(ValueError, match="the state is of pskd_teacher='bank': resume with the same teacher"):
        fit('pskd', 'text', tmp_path, resume=True, pskd_teacher='ema', num_train_epochs=4)


def test_the_parts_of_the_loss_are_in_the_trainers_log(tmp_path):
    how = dict(logging_strategy='steps', logging_steps=1, pskd_teacher='ema', pskd_alpha=0.5)
    trainer = fit('pskd', 'text', tmp_path, **how)
    entries = [entry for entry in trainer.state.log_history if 'loss' in entry]
    assert len(entries) == EPOCHS * 4
    assert [entry['pskd_alpha'] for entry in entries[::4]] == pytest.approx([0.5 / 3, 1 / 3, 0.5])
    for entry, loss in zip(entries, trainer.losses):
        assert entry['pskd_hard'] + entry['pskd_soft'] == pytest.approx(loss, rel=1e-5)
        assert (entry['pskd_entropy'] > 0) == (entry is not entries[0] and entry not in entries[:4])
    kept = fit('pskd', 'text', tmp_path, **how, pskd_keep_hard=True)
    assert kept.losses[:4] == trainer.losses[:4]
    assert kept.losses[4] > trainer.losses[4]


@pytest.mark.parametrize('teacher', ['snapshot', 'ema'])
def test_an_interval_is_in_steps_of_the_optimizer_and_one_epoch_is_enough(teacher, tmp_path):
    how = dict(num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    plain = fit('plain', 'text', tmp_path, **how)
    how.update(pskd_alpha=0.8, pskd_teacher=teacher, pskd_interval=2, save_strategy='steps', save_steps=3)
    trainer = fit('pskd', 'text', tmp_path, **how)
    assert trainer.losses[:4] == plain.losses[:4]
    assert all(a != b for a, b in zip(trainer.losses[4:], plain.losses[4:]))
    assert trainer.pskd.current_alpha == pytest.approx(0.8 * 4 / 6)
    resumed = fit('pskd', 'text', tmp_path, resume=str(tmp_path / 'checkpoint-3'), **how)
    assert resumed.losses == trainer.losses[6:]


def test_a_checkpoint_without_a_past_within_an_epoch(tmp_path, caplog):
    """Plain until the next epoch."""
    plain = fit('plain', 'text', tmp_path, save_strategy='steps', save_steps=6)
    resumed = fit('pskd', 'text', tmp_path, resume=str(tmp_path / 'checkpoint-6'), pskd_teacher='snapshot')
    assert 'holds no past predictions: plain training until there are some' in caplog.text
    assert resumed.losses[:2] == plain.losses[6:8]
    assert resumed.losses[2] != plain.losses[8]


def test_what_is_set_on_a_numbered_data_set_is_the_users(tmp_path):
    data = Texts('class')
    numbered = _Numbered(data)
    numbered.noise = 7
    assert data.noise == copy.deepcopy(numbered).noise == 7


def test_a_stream_whose_length_is_known_has_a_snapshot(tmp_path):
    plain = fit('plain', 'text', tmp_path, data=Counted())
    trainer = fit('pskd', 'text', tmp_path, data=Counted(), pskd_teacher='snapshot')
    assert trainer.losses[:4] == pytest.approx(plain.losses[:4])
    assert all(abs(a - b) > 1e-5 for a, b in zip(trainer.losses[4:], plain.losses[4:]))


@dataclass
class Seq2SeqArguments(PSKDArguments, transformers.Seq2SeqTrainingArguments):
    pass


class Seq2Seq(PSKDMixin, transformers.Seq2SeqTrainer):
    pass


def test_the_mixins_go_with_other_trainers_and_arguments(tmp_path):
    trainer = fit('pskd', 'translation', tmp_path, arguments=Seq2SeqArguments, trainer=Seq2Seq, pskd_alpha=0.5)
    assert trainer.pskd.current_alpha == 0.5


def test_the_settings_can_be_given_on_the_command_line(tmp_path):
    parser = transformers.HfArgumentParser(PSKDTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(['--output_dir', str(tmp_path), '--pskd_alpha', '0.5'])
    assert isinstance(args, PSKDArguments)
    assert args.pskd_alpha == 0.5
    assert args.pskd_top_k is None
