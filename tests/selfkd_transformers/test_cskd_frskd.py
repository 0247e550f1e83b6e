"""CS-KD and FRSKD under transformers' own Trainer; models are built from configs, nothing is downloaded."""

import os
from dataclasses import dataclass

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch
import torch.nn.functional as F
from helpers.processes import in_processes
from sklearn.datasets import load_digits
from torch.utils.data import IterableDataset

transformers = pytest.importorskip('transformers', reason='transformers is not installed')
pytest.importorskip('accelerate', reason='accelerate is not installed')

from transformers import Trainer, TrainingArguments  # noqa: E402

import selfkd_transformers as ours  # noqa: E402
from selfkd.losses import distillation_kl  # noqa: E402
from selfkd_transformers.numbered import labels_of  # noqa: E402

EPOCHS, SAMPLES, CLASSES = 3, 24, 10
STEPS = SAMPLES // 6


class Notes:
    """Keeps the loss of every step, and what the model was called with in training."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, 'losses', []), loss.item()]
        return loss


class Plain(Notes, Trainer):
    pass


class WithCSKD(Notes, ours.CSKDTrainer):
    pass


class WithFRSKD(Notes, ours.FRSKDTrainer):
    pass


class WithAll(Notes, ours.PSKDMixin, ours.CSKDMixin, ours.FRSKDMixin, Trainer):
    pass


@dataclass
class AllArguments(ours.PSKDArguments, ours.CSKDArguments, ours.FRSKDArguments, TrainingArguments):
    pass


ARGUMENTS = {
    Plain: TrainingArguments,
    WithCSKD: ours.CSKDTrainingArguments,
    WithFRSKD: ours.FRSKDTrainingArguments,
    WithAll: AllArguments,
}


def images(count=SAMPLES):
    scans = load_digits()
    pixels = torch.tensor(scans.images[:count], dtype=torch.float32)[:, None] / 16
    return [dict(pixel_values=image, labels=label) for image, label in zip(pixels, scans.target[:count].tolist())]


def vit():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES, **sizes)
    return transformers.ViTForImageClassification(config)


def resnet():
    sizes = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic')
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(num_channels=1, num_labels=CLASSES, **sizes)
    )


def make(kind, folder, *, model=None, data=None, arguments=None, **options):
    torch.manual_seed(0)
    given = {name: options.pop(name) for name in [*options] if name in ('callbacks', 'compute_loss_func')}
    quiet = dict(
        output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=6, learning_rate=0.01, seed=3,
        report_to='none', disable_tqdm=True, save_strategy='no', logging_strategy='no', use_cpu=True,
        lr_scheduler_type='constant',
    )  # fmt: skip
    base = next(known for known in ARGUMENTS if issubclass(kind, known))
    args = (arguments or ARGUMENTS[base])(**{**quiet, **options})
    model = model or (vit() if base in (Plain, WithCSKD) else resnet())
    return kind(model=model, args=args, train_dataset=data or images(), eval_dataset=images(8), **given)


def fit(kind, folder, resume=None, **options):
    trainer = make(kind, folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values()))


class KeepsPartners(WithCSKD):
    """Computes each loss again, from the partners that came with the batch."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.partners = inputs['selfkd_partners']
        rows = inputs['selfkd_rows']
        drawn = torch.tensor([sample['labels'] for sample in self.train_dataset])[rows].view(2, -1)
        assert drawn[0].tolist() == drawn[1].tolist() == inputs['labels'].tolist() == self.partners['labels'].tolist()
        self.rows = [*getattr(self, 'rows', []), rows]
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():  # neither model has dropout or statistics
            partners = model(pixel_values=self.partners['pixel_values']).logits
            plain = F.cross_entropy(outputs.logits, inputs['labels'])
        term = self.args.cskd_weight * distillation_kl(outputs.logits, partners, self.args.cskd_temperature)
        scale = 6 / num_items_in_batch if num_items_in_batch is not None else 1
        self.expected = [*getattr(self, 'expected', []), (scale * (plain + term)).item()]
        self.got = [*getattr(self, 'got', []), loss.item()]
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    'options',
    [{}, dict(gradient_accumulation_steps=2, dataloader_num_workers=1)],
    ids=['', 'accumulation'],
)
def test_cskd_is_the_papers_loss(options, tmp_path):
    """Whatever the Trainer divides by, the term is a part of each sample's loss. Partners change each epoch."""
    trainer = fit(KeepsPartners, tmp_path, cskd_weight=0.5, cskd_temperature=3.0, **options)
    assert trainer.got == pytest.approx(trainer.expected, rel=1e-5)
    assert len(trainer.got) == EPOCHS * STEPS
    partners = [dict(zip(rows[:6], rows[6:])) for rows in trainer.rows]
    epochs = [sorted(p for step in partners[e * STEPS : (e + 1) * STEPS] for p in step.items()) for e in range(EPOCHS)]
    assert [anchor for anchor, _ in epochs[0]] == list(range(SAMPLES))
    assert epochs[0] != epochs[1]


def logged(trainer, *names):
    """Of each step, summed."""
    steps = [entry for entry in trainer.state.log_history if 'loss' in entry]
    return [sum(entry[name] for name in names) for entry in steps]


FRSKD_TERMS = ('loss_teacher', 'loss_kd', 'loss_feature')


class Smoothed(WithFRSKD):
    """Computes the self-teacher's loss again, which learns the labels as the model does."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = inputs['labels']
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad():
            expected = F.cross_entropy(self.teacher_logits, labels, label_smoothing=self.args.label_smoothing_factor)
        assert self.frskd.logs['loss_teacher'].item() == pytest.approx(expected.item(), rel=1e-5)
        return loss

    def _make(self, *args):
        note = lambda module, args, output: vars(self).update(teacher_logits=output[1].detach().float())  # noqa: E731
        self.frskd.self_teacher.register_forward_hook(note)
        return super()._make(*args)


def summed(outputs, labels, num_items_in_batch):
    return F.cross_entropy(outputs.logits, labels, reduction='sum') / num_items_in_batch


@pytest.mark.parametrize('options', [
    {}, dict(gradient_accumulation_steps=2, compute_loss_func=summed), dict(bf16=True, label_smoothing_factor=0.1),
], ids=['', 'accumulation', 'bf16 and smoothing'])  # fmt: skip
def test_frskd_adds_its_terms_and_trains_the_self_teacher(options, tmp_path):
    how = dict(logging_strategy='steps', logging_steps=1, **options)
    trainer, plain = (make(kind, tmp_path, model=resnet(), **how) for kind in (Smoothed, Plain))
    plain.model.load_state_dict(trainer.model.state_dict())
    trainer.train()
    plain.train()
    terms, accumulated = logged(trainer, *FRSKD_TERMS), options.get('gradient_accumulation_steps', 1)
    assert len(terms) == EPOCHS * STEPS // accumulated
    added = trainer.losses[accumulated - 1] - plain.losses[accumulated - 1]  # of the batch that the log is of
    assert added == pytest.approx(terms[0] / accumulated, rel=2e-2 if 'bf16' in options else 1e-4)
    assert terms[-1] < terms[0]
    assert trainer.frskd.layers == ['resnet.embedder.embedder', 'resnet.encoder.stages.0']
    assert not any('teacher' in name for name in trainer.model.state_dict())
    assert not any(module._forward_hooks for module in trainer.model.modules())  # they are training's
    trained = {id(param) for param in trainer.optimizer.param_groups[0]['params']}
    assert all(id(param) in trained and param.grad is None for param in trainer.frskd.parameters())


def test_layers_can_be_named(tmp_path):
    layers = ['resnet.embedder', 'resnet.encoder.stages.0']
    assert fit(WithFRSKD, tmp_path, frskd_layers=layers, num_train_epochs=1).frskd.layers == layers


@pytest.mark.parametrize('when', ['epoch', 'steps'])
@pytest.mark.parametrize('kind', [WithCSKD, WithFRSKD, WithAll])
def test_resume_is_exact(kind, when, tmp_path):
    """From the end of an epoch, and from within one. (transformers 5.23 itself does not load a ViT's checkpoint.)"""
    done = 8 if when == 'epoch' else 6
    how = dict(save_strategy='steps', save_steps=done)
    if kind is WithAll and when == 'steps':
        how.update(pskd_teacher='ema', pskd_interval=3)
    straight = fit(kind, tmp_path, model=resnet(), **how)
    resumed = fit(kind, tmp_path, model=resnet(), resume=str(tmp_path / f'checkpoint-{done}'), **how)
    assert resumed.losses == straight.losses[done:]
    assert same(resumed, straight)


def distributed(kind, folder):
    trainer = fit(kind, folder, per_device_train_batch_size=3, ddp_backend='gloo')
    weights = dict(trainer.model.named_parameters())
    if kind is not WithCSKD:
        weights.update({f'teacher.{name}': value for name, value in trainer.frskd.self_teacher.named_parameters()})
    return {name: value.detach().clone() for name, value in weights.items()}


@pytest.mark.parametrize('kind', [WithCSKD, WithAll])
def test_two_processes_agree(kind, tmp_path):
    one, two = in_processes(tmp_path, lambda rank: distributed(kind, tmp_path), 2)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_the_three_go_together_and_evaluation_is_plain(tmp_path):
    how = dict(logging_strategy='steps', logging_steps=1, eval_strategy='epoch')
    trainer = fit(WithAll, tmp_path, **how)
    steps = [entry for entry in trainer.state.log_history if 'loss' in entry]
    for entry, loss in zip(steps, trainer.losses):
        parts = ('pskd_hard', 'pskd_soft', 'loss_cskd', *FRSKD_TERMS)
        assert sum(entry[name] for name in parts) == pytest.approx(loss, rel=1e-4)
    assert steps[-1]['pskd_alpha'] == pytest.approx(0.3)
    assert steps[-1]['pskd_soft'] > 0
    found = [entry['eval_loss'] for entry in trainer.state.log_history if 'eval_loss' in entry][-1]
    plain = make(Plain, tmp_path, model=trainer.model)
    assert plain.evaluate()['eval_loss'] == pytest.approx(found, rel=1e-5)
    assert trainer.pskd.bank.seen(torch.arange(SAMPLES)).all()
    again = len(trainer.losses)
    trainer.train()  # anew, with the same self-teacher
    assert len(trainer.losses) == 2 * again


@pytest.mark.parametrize('order', ['CPF', 'FPC'])
def test_mixins_may_come_in_any_order(order, tmp_path):
    mixin = {'P': ours.PSKDMixin, 'C': ours.CSKDMixin, 'F': ours.FRSKDMixin}
    kind = type('Ordered', (Notes, *(mixin[letter] for letter in order), Trainer), {})
    ARGUMENTS[kind] = AllArguments
    trainer = fit(kind, tmp_path, logging_strategy='steps', logging_steps=1)
    steps = [entry for entry in trainer.state.log_history if 'loss' in entry]
    for entry, loss in zip(steps, trainer.losses):
        parts = ('pskd_hard', 'pskd_soft', 'loss_cskd', *FRSKD_TERMS)
        assert sum(entry[name] for name in parts) == pytest.approx(loss, rel=1e-4)


def test_train_may_be_called_again_after_any_number_of_steps(tmp_path):
    trainer = fit(WithCSKD, tmp_path, max_steps=1)
    trainer.train()
    assert len(trainer.losses) == 2


class Interrupted(WithFRSKD):
    """Ctrl-C between the backward pass and the optimizer's step."""

    interrupts = True

    def training_step(self, *args, **kwargs):
        teacher = [p.grad is not None for p in self.frskd.parameters()]
        self.found = [*getattr(self, 'found', []), any(teacher)]
        loss = super().training_step(*args, **kwargs)
        if self.interrupts:
            raise KeyboardInterrupt
        return loss


def test_an_interrupted_training_leaves_no_gradients(tmp_path):
    trainer = make(Interrupted, tmp_path, max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.interrupts = False
    trainer.train()
    assert trainer.found == [False, False, False]


def test_a_loop_that_tells_the_callbacks_nothing_is_no_plain_training(tmp_path):
    trainer = make(WithCSKD, tmp_path)
    with pytest.raises(RuntimeError, match='CSKD: training has not begun for the mix-in, so this step would be plain'):
        trainer.training_step(trainer.model, {})


def test_weight_zero_is_the_plain_trainer(tmp_path):
    plain, zero = fit(Plain, tmp_path), fit(WithCSKD, tmp_path, cskd_weight=0.0)
    assert zero.losses == plain.losses
    assert same(zero, plain)


class Columns(list):
    """As Hugging Face's data sets: columns, and a transform that other code put there."""

    column_names = ('pixel_values', 'label')

    def with_format(self, kind):
        assert kind is None
        return Columns(self)

    def __getitem__(self, index):
        assert index == 'label'  # a sample would be decoded and transformed
        return [sample['labels'] for sample in self]


def test_classes_come_from_a_column_where_there_is_one():
    assert labels_of(Columns(images())) == labels_of(images()) == load_digits().target[:SAMPLES].tolist()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(images())

    def __len__(self):
        return SAMPLES


class Halved(WithCSKD):
    """Changes what the model gets, and does not say so."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = dict(inputs, pixel_values=inputs['pixel_values'] / 2)
        return super().compute_loss(model, inputs, *args, **kwargs)


class Said(Halved):
    def cskd_inputs(self, batch):
        return dict(pixel_values=batch['pixel_values'] / 2)


class TwoLosses(WithFRSKD):
    def compute_loss(self, model, inputs, *args, **kwargs):
        outputs = model(inputs['pixel_values'])
        return F.cross_entropy(outputs.logits, inputs['labels']) + F.cross_entropy(-outputs.logits, inputs['labels'])


class OwnOptimizer(WithFRSKD):
    def create_optimizer(self, *args):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


class NoLoss(WithFRSKD):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(inputs['pixel_values']).logits.square().mean()


def test_what_cannot_work_is_refused(tmp_path):
    regression = [dict(sample, labels=[1.0, 2.0]) for sample in images()]
    for error, message, kind, how in (
        (ValueError, 'cskd_weight must be .* got -1', WithCSKD, dict(cskd_weight=-1.0)),
        (ValueError, 'frskd_temperature must be .* got 0', WithFRSKD, dict(frskd_temperature=0.0)),
        (ValueError, r'CSKD: args must be CSKDTrainingArguments \(or mix CSKDArguments in\)', WithCSKD,
         dict(arguments=TrainingArguments)),
        (ValueError, r'CSKD: args ask for it \(cskd_weight=1.0\), but Plain .*MyTrainer\(CSKDMixin, Plain\), or set',
         Plain, dict(arguments=ours.CSKDTrainingArguments)),
        (ValueError, r'FRSKD: args ask for it .* class MyTrainer\(FRSKDMixin, WithCSKD\), or leave', WithCSKD,
         dict(arguments=AllArguments, pskd_alpha=0.0)),
        (ValueError, 'CSKD: a?.*come from a Stream.*map-style data set', WithCSKD, dict(data=Stream(), max_steps=8)),
        (ValueError, 'labels: must be one class id', WithCSKD, dict(data=regression)),
        (ValueError, 'CSKD: .* list has no class for each of its samples', WithCSKD,
         dict(data=[dict(pixel_values=s['pixel_values']) for s in images()])),
        (ValueError, 'was called with .* partners would come as .*: override cskd_inputs', Halved, {}),
        (ValueError, 'ViTForImageClassification give . .*name modules as frskd_layers=', WithFRSKD, dict(model=vit())),
        (ValueError, "frskd_layers must name two or more .*not there: .'nope'", WithFRSKD,
         dict(frskd_layers=['nope', 'resnet'])),
        (ValueError, 'optim=lomo cannot be used here', WithFRSKD, dict(optim='lomo')),
        (RuntimeError, 'OwnOptimizer.create_optimizer must call super', OwnOptimizer, {}),
        (RuntimeError, 'a second cross-entropy in one batch.*compute one, in compute_loss', TwoLosses, {}),
        (RuntimeError, 'FRSKD: a batch was trained on without a cross-entropy', NoLoss, {}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fit(kind, tmp_path, **{'num_train_epochs': 1, **how})
    assert len(fit(Said, tmp_path).losses) == EPOCHS * STEPS
    fit(Plain, tmp_path, model=resnet(), save_strategy='epoch')
    with pytest.raises(ValueError, match='checkpoint-12 holds no self-teacher'):
        fit(WithFRSKD, tmp_path, resume=True)


def test_a_mixin_comes_before_the_trainer():
    with pytest.raises(TypeError, match=r'Wrong has CSKDMixin after the Trainer, .*class Wrong\(CSKDMixin, Trainer\)'):

        class Wrong(ours.FRSKDMixin, Trainer, ours.CSKDMixin):
            pass


def test_the_settings_can_be_given_on_the_command_line(tmp_path):
    parser = transformers.HfArgumentParser(AllArguments)
    given = ['--cskd_weight', '0.5', '--frskd_layers', 'stem', 'body', '--frskd_beta', '0']
    (args,) = parser.parse_args_into_dataclasses(['--output_dir', str(tmp_path), *given])
    assert (args.cskd_weight, args.frskd_layers, args.frskd_beta) == (0.5, ['stem', 'body'], 0)
