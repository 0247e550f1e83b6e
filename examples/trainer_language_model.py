"""PS-KD in the Hugging Face Trainer, for a causal language model. Nothing is downloaded; a token is a byte."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from selfkd_transformers import PSKDMixin, PSKDTrainingArguments


class MyTrainer(PSKDMixin, Trainer):
    """The mix-in comes before the Trainer."""


text = ' '.join(f'{a} times {b} is {a * b}.' for a in range(20) for b in range(20)).encode()
rows = [torch.tensor(list(text[i : i + 64])) for i in range(0, len(text) - 64, 64)]
dataset = [dict(input_ids=row, labels=row) for row in rows]
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2))
args = PSKDTrainingArguments(
    output_dir='work',
    num_train_epochs=3,
    per_device_train_batch_size=16,
    logging_steps=5,  # the log then shows pskd_alpha, pskd_hard, pskd_soft
    report_to='none',
    save_strategy='no',
    use_cpu=True,
)
trainer = MyTrainer(model=model, args=args, train_dataset=dataset)
trainer.train()
print(f'alpha {trainer.pskd.current_alpha:.1f}')
