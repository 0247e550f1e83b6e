"""Trains and measures one run of an experiment on a language model: see experiments.py for the settings.

The data folder holds `multi30k/data/task1/raw/*.en.gz`. What is trained is a small GPT-2 in the Hugging Face Trainer.
"""

import gzip
import os
import tempfile
import time
from pathlib import Path
from typing import Dict, List

import torch
from cifar import calibration
from torch import Tensor

from selfkd import metrics
from selfkd.files import replacing

WORDS, LENGTH = 4000, 48  # of the vocabulary; in tokens
PARTS = {'train': 'train', 'held_out': 'val', 'test': 'test_2016_flickr'}
HALF = 14500  # of the 29,000 training sentences, for the model that fine-tuning begins with
BASE = dict(epochs=10, lr=1e-3, batch=32)


def prepare(folder: str) -> Path:
    """Encodes the sentences and trains the model that fine-tuning begins with, once: the file that holds both.

    Raises:
        FileNotFoundError: the folder does not hold the data; the message says how to get them.
    """
    root = Path(folder)
    path = root / 'language-model.pt'
    if path.exists():
        return path
    files = {part: root / f'multi30k/data/task1/raw/{name}.en.gz' for part, name in PARTS.items()}
    if not all(file.exists() for file in files.values()):
        raise FileNotFoundError(
            f'{root}: must hold multi30k/data/task1/raw:\n'
            f'  git clone https://github.com/multi30k/dataset {root}/multi30k'
        )
    data = encode({part: gzip.decompress(file.read_bytes()).decode().splitlines() for part, file in files.items()})
    base = train(new_model(0), data['train'][:HALF], BASE, seed=0)
    with replacing(path) as beside:
        torch.save(dict(data, base=base.state_dict()), beside)
    return path


def encode(lines: Dict[str, List[str]]) -> Dict[str, List[List[int]]]:
    """Token ids of each sentence, by a byte-pair encoding learnt on the first half of the training set."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(lines['train'][:HALF], WORDS, special_tokens=['<end>'], show_progress=False)
    return {
        part: [[0, *tokenizer.encode(line).ids[: LENGTH - 2], 0] for line in lines_of]
        for part, lines_of in lines.items()
    }


def new_model(seed: int):
    """A GPT-2 of 1.1 million weights, with its usual dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=128, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def collate(rows: List[List[int]]) -> Dict[str, Tensor]:
    """Padded at the end; the padding has no label."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


def train(model, rows: List[List[int]], settings: dict, seed: int, callbacks=()):
    """The model, after the Trainer's usual training: AdamW, a linearly falling learning rate.

    Args:
        model: that is trained.
        rows: token ids of each sentence.
        settings: ``epochs``, ``lr``, ``batch``, and of a method ``label_smoothing`` or ``pskd`` (its options).
        seed: of the order and the dropout.
        callbacks: the Trainer's.
    """
    from transformers import Trainer, TrainingArguments

    from selfkd_transformers import PSKDMixin, PSKDTrainingArguments

    kind, arguments_kind = Trainer, TrainingArguments
    if 'pskd' in settings:
        kind, arguments_kind = type('PSKDTrainer', (PSKDMixin, Trainer), {}), PSKDTrainingArguments
    with tempfile.TemporaryDirectory() as out:
        arguments = arguments_kind(
            output_dir=out,
            num_train_epochs=settings['epochs'],
            learning_rate=settings['lr'],
            per_device_train_batch_size=settings['batch'],
            label_smoothing_factor=settings.get('label_smoothing', 0.0),
            seed=seed,
            save_strategy='no',
            logging_strategy='no',
            report_to='none',
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            **{f'pskd_{name}': value for name, value in settings.get('pskd', {}).items()},
        )
        kind(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=list(callbacks)).train()
    return model


@torch.no_grad()
def predict(model, rows: List[List[int]]):
    """Logits ``[N, C]`` and labels ``[N]`` of all tokens but the first of each sentence."""
    model.eval()
    logits, labels = [], []
    for start in range(0, len(rows), 100):
        batch = collate(rows[start : start + 100])
        real = batch['labels'][:, 1:] != -100
        logits.append(model(batch['input_ids'], attention_mask=batch['attention_mask']).logits[:, :-1][real])
        labels.append(batch['labels'][:, 1:][real])
    model.train()
    return torch.cat(logits), torch.cat(labels)


def measure(model, data: dict) -> Dict[str, float]:
    """On the test set: of the logits as they are, and (``_scaled``) at a temperature fitted on held-out data."""
    temperature = metrics.fit_temperature(*predict(model, data['held_out']))
    return calibration(*predict(model, data['test']), temperature)


def run(folder: str, settings: dict, seed: int) -> dict:
    """Trains one model and measures it twice: at the end, and as it was when its held-out NLL was lowest.

    Args:
        folder: with the data.
        settings: ``sentences`` (of the training set's other half), ``start`` (``'random'`` weights, or ``'trained'``
            on the first half), and what :func:`train` takes.
        seed: of the sentences, the first weights, the order and the dropout.

    Returns:
        ``measures`` of the ``early`` and the ``last`` weights, ``epochs``: None, held-out NLL and held-out error of
        each, and ``seconds``: of a core's time.
    """
    from transformers import TrainerCallback

    torch.set_num_threads(1)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    data, started = torch.load(prepare(folder), weights_only=True), time.process_time()
    chosen = torch.randperm(HALF, generator=torch.Generator().manual_seed(seed))[: settings['sentences']]
    model = new_model(seed)
    if settings['start'] == 'trained':
        model.load_state_dict(data['base'])
    epochs, early = [], {}

    class AfterEachEpoch(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            logits, labels = predict(model, data['held_out'])
            nll, wrong = metrics.nll(logits.softmax(1), labels), (logits.argmax(1) != labels).double().mean().item()
            if not epochs or nll < min(epoch[1] for epoch in epochs):
                early.update({name: value.clone() for name, value in model.state_dict().items()})
            epochs.append([None, round(nll, 4), round(wrong, 4)])

    train(model, [data['train'][HALF + row] for row in chosen.tolist()], settings, seed, [AfterEachEpoch()])
    measures = {'last': measure(model, data)}
    model.load_state_dict(early)
    measures['early'] = measure(model, data)
    return dict(measures=measures, epochs=epochs, seconds=time.process_time() - started)
