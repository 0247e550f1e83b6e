"""pskd_fused: causal language models in transformers' own Trainer, without logits of all tokens."""

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch
import torch.nn.functional as F
from helpers.processes import in_processes

transformers = pytest.importorskip('transformers', reason='transformers is not installed')
pytest.importorskip('accelerate', reason='accelerate is not installed')

from transformers import Trainer  # noqa: E402

from selfkd_transformers import PSKDMixin, PSKDTrainingArguments  # noqa: E402

SAMPLES, VOCABULARY = 24, 20


class MyTrainer(PSKDMixin, Trainer):
    """Keeps the loss of every step, and the largest tensor that has a place for each token of the vocabulary."""

    def training_step(self, *args, **kwargs):
        with Largest() as largest:
            loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, 'losses', []), loss.item()]
        self.largest = max(getattr(self, 'largest', 0), largest.rows)
        return loss


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == VOCABULARY:
            self.rows = max(self.rows, out.untyped_storage().nbytes() // out.element_size() // VOCABULARY)
        return out


def texts():
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 9, (SAMPLES,), generator=random).tolist()
    return [dict(input_ids=torch.randint(3, VOCABULARY, (length,), generator=random).tolist()) for length in lengths]


def pad(features):
    """On the left."""
    length = max(len(feature['input_ids']) for feature in features)
    fill = lambda by: [[by] * (length - len(f['input_ids'])) + f['input_ids'] for f in features]  # noqa: E731
    ids, labels = torch.tensor(fill(0)), torch.tensor(fill(-100))
    return dict(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels)


SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def gpt2():
    sizes = dict(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


def gemma():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8))


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def make(folder, model=gpt2, kind=MyTrainer, **options):
    torch.manual_seed(0)
    quiet = dict(
        output_dir=str(folder), num_train_epochs=3, per_device_train_batch_size=6, learning_rate=0.01, seed=3,
        report_to='none', disable_tqdm=True, save_strategy='no', logging_strategy='no', use_cpu=True,
        lr_scheduler_type='constant', pskd_alpha=0.8,
    )  # fmt: skip
    given = {name: options.pop(name) for name in [*options] if name in ('compute_loss_func', 'data_collator')}
    args = PSKDTrainingArguments(**{**quiet, **options})
    data = dict(train_dataset=texts(), eval_dataset=texts()[:5])
    return kind(model=model(), args=args, **data, **{'data_collator': pad, **given})


def fit(folder, *args, resume=None, **options):
    trainer = make(folder, *args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize('model', [gpt2, llama])
@pytest.mark.parametrize('options', [{}, dict(gradient_accumulation_steps=2, pskd_keep_hard=True)],
                         ids=['', 'accumulation'])  # fmt: skip
def test_it_is_the_loss_with_logits(model, options, tmp_path, monkeypatch):
    monkeypatch.setattr('selfkd.losses.linear.LOGITS_AT_ONCE', {'cpu': 1})  # 16 tokens at a time
    how = dict(model=model, logging_strategy='steps', logging_steps=1, eval_strategy='epoch', **options)
    with_logits, fused = (fit(tmp_path, pskd_fused=fused, **how) for fused in (False, True))
    assert fused.losses == pytest.approx(with_logits.losses, rel=1e-5)
    assert with_logits.largest >= 6 * 7
    assert fused.largest <= VOCABULARY
    for ours, theirs in zip(fused.model.parameters(), with_logits.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    names = ('pskd_alpha', 'pskd_hard', 'pskd_soft', 'pskd_entropy', 'eval_loss')
    for ours, theirs in zip(fused.state.log_history, with_logits.state.log_history):
        for name in names:
            assert ours.get(name, -1) == pytest.approx(theirs.get(name, -1), rel=1e-4)
    assert fused.pskd.current_alpha == 0.8


def test_mixed_precision(tmp_path):
    with_logits, fused = (fit(tmp_path, pskd_fused=fused, bf16=True) for fused in (False, True))
    assert fused.losses == pytest.approx(with_logits.losses, rel=2e-2)


def test_resume_is_exact(tmp_path):
    how = dict(pskd_fused=True, save_strategy='steps', save_steps=6)
    straight = fit(tmp_path, **how)
    resumed = fit(tmp_path, resume=str(tmp_path / 'checkpoint-6'), **how)
    assert resumed.losses == straight.losses[6:]


def distributed(folder):
    trainer = fit(folder, pskd_fused=True, per_device_train_batch_size=3, ddp_backend='gloo')
    return dict(weights=[p.detach().clone() for p in trainer.model.parameters()], bank=trainer.pskd.bank.state_dict())


def test_two_processes_agree(tmp_path):
    one, two = in_processes(tmp_path, lambda rank: distributed(tmp_path), 2)
    for mine, other in zip(one['weights'], two['weights']):
        assert torch.equal(mine, other)
    assert torch.equal(one['bank']['values'], two['bank']['values'])
    assert torch.equal(one['bank']['seen'], two['bank']['seen'])


class Asks(MyTrainer):
    """Looks at the logits of a training step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.seen = [*getattr(self, 'seen', []), outputs.logits]
        return (loss, outputs) if return_outputs else loss


class OwnLoss(MyTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = F.pad(inputs.pop('labels'), (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())


class ModelsLoss(MyTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(**inputs).loss


class Forward(MyTrainer):
    """A loss without the one that it overrides, and without logits."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(inputs['input_ids']).logits.square().mean()


def shifted(features):
    batch = pad(features)
    return dict(batch, shift_labels=F.pad(batch['labels'], (0, 1), value=-100)[:, 1:])


def test_nobody_takes_one_tokens_logits_for_all(tmp_path):
    trainer = fit(tmp_path, kind=Asks, pskd_fused=True)
    assert all(logits is None for logits in trainer.seen)
    assert trainer.evaluate()['eval_loss'] > 0
    assert trainer.seen[-1].shape[1] > 1  # in evaluation they are there


def test_what_cannot_work_is_refused(tmp_path):
    for message, how in (
        ('pskd_fused beside pskd_teacher=ema cannot be used here: use the bank', dict(pskd_teacher='ema')),
        ('pskd_fused keeps a bank of tokens, which these data cannot have',
         dict(data_collator=Masks())),
        ('label_smoothing_factor beside pskd_fused cannot be used', dict(label_smoothing_factor=0.1)),
        ('compute_loss_func beside pskd_fused cannot be used', dict(compute_loss_func=print)),
        ('pskd_fused is for causal language models, and BertForMaskedLM has another loss', dict(model=bert)),
        ('changes what its output layer gives .soft-capping', dict(model=gemma)),
        ('the batch has shift_labels: set pskd_fused=False', dict(data_collator=shifted)),
        ('was trained on without compute_loss_func', dict(kind=Forward)),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=message):
            fit(tmp_path, pskd_fused=True, **how)
    for kind in (OwnLoss, ModelsLoss):
        with pytest.raises(ValueError, match='with pskd_fused compute_loss must be the Trainer.s: set'):
            fit(tmp_path, pskd_fused=True, kind=kind)
    with pytest.raises(ValueError, match='use_liger_kernel cannot be used here: .*: set pskd_fused=True'):
        make(tmp_path, use_liger_kernel=True)
    make(tmp_path, use_liger_kernel=True, pskd_fused=True)
    make(tmp_path, use_liger_kernel=True, liger_kernel_config=dict(fused_linear_cross_entropy=False))


class Masks:
    mlm = True

    def __call__(self, features):
        return pad(features)


class SFTTrainer(MyTrainer):
    """As TRL's: the loss is of what its own output layer gives."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.compute_loss_func is None:
            return -model(inputs['input_ids']).logits.log_softmax(-1)[..., 0].mean()
        labels = inputs.pop('labels')
        return self.compute_loss_func(model(**inputs), labels, num_items_in_batch=num_items_in_batch)


def test_trls_trainer(tmp_path):
    with pytest.raises(RuntimeError, match="TRL's SFTTrainer computes no cross-entropy of logits: set pskd_fused=True"):
        fit(tmp_path, kind=SFTTrainer)
    assert fit(tmp_path, kind=SFTTrainer, pskd_fused=True).losses == fit(tmp_path, pskd_fused=True).losses
