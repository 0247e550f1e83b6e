"""What a training step with PS-KD costs against fairseq's label_smoothed_cross_entropy, in fairseq's own Trainer."""

import logging
from typing import List, NamedTuple, Sequence

import torch
from costs import Table, compare
from fairseq import criterions, options
from fairseq.data import Dictionary, LanguagePairDataset, ListDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer

import selfkd_fairseq  # noqa: F401  (registers what is measured)

__all__ = ['step_suite']

VANILLA = 'label_smoothed_cross_entropy'
METHODS = {
    VANILLA: [],
    'PS-KD, snapshot': ['--pskd-teacher', 'snapshot'],
    'PS-KD, token bank': ['--pskd-teacher', 'bank'],
}


class Shape(NamedTuple):
    """Of the Transformer, ``layers`` in the encoder and in the decoder, and of its batches."""

    vocabulary: int = 10000
    dim: int = 256
    layers: int = 3
    tokens: int = 2000
    sentences: int = 300
    dropout: float = 0.1
    amp: bool = False


BASE = Shape(vocabulary=37000, dim=512, layers=6, tokens=8192, sentences=1400, amp=True)
SHAPES = dict(
    tiny=BASE._replace(vocabulary=50, dim=64, layers=1, tokens=200, sentences=20),
    small=Shape(),
    full=BASE,
)


def make_task(extra: Sequence[str], criterion: str, shape: Shape):
    """What fairseq-train would make of its arguments: a config, and a task with random sentences of 10 to 40 tokens."""
    criterion = criterion or (f'pskd_{VANILLA}' if extra else VANILLA)
    args = ['no-data', '--task', 'translation', '--arch', 'transformer', '--criterion', criterion, *extra]
    args += f'--max-tokens {shape.tokens} --dropout {shape.dropout} --share-decoder-input-output-embed'.split()
    args += ['--label-smoothing', '0.1', '--optimizer', 'adam', '--lr', '1e-4', '--max-epoch', '10', '--seed', '1']
    for side in ('encoder', 'decoder'):
        args += f'--{side}-layers {shape.layers} --{side}-embed-dim {shape.dim}'.split()
        args += f'--{side}-ffn-embed-dim {4 * shape.dim} --{side}-attention-heads {max(shape.dim // 64, 1)}'.split()
    args += ['--amp'] if shape.amp else []
    args += [] if torch.cuda.is_available() else ['--cpu']
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), args))
    words = Dictionary()
    for i in range(shape.vocabulary - len(words)):
        words.add_symbol(f'w{i}')
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 41, (shape.sentences,), generator=generator).tolist()
    lines = [torch.randint(words.nspecial, len(words), (n,), generator=generator) for n in lengths]
    for line in lines:
        line[-1] = words.eos()
    text = ListDataset(lines, lengths)
    task = TranslationTask(cfg.task, words, words)
    task.datasets['train'] = LanguagePairDataset(text, lengths, words, text, lengths, words)
    task.load_dataset = lambda *args, **kwargs: None
    return cfg, task


def make_trainer(extra: Sequence[str], criterion: str = '', **shape):
    """A Trainer in its second epoch, where there is a past, and its batches."""
    cfg, task = make_task(extra, criterion, Shape(**shape))
    torch.manual_seed(1)
    model = task.build_model(cfg.model)
    trainer = Trainer(cfg, task, model, criterions.build_criterion(cfg.criterion, task))
    epoch_itr = trainer.get_train_iterator(epoch=1)
    for epoch in (1, 2):  # the first gives PS-KD its past
        itr = epoch_itr.next_epoch_itr(shuffle=True)
        trainer.begin_epoch(epoch)
        batches = list(itr)
        for batch in batches if epoch == 1 else batches[:1]:
            trainer.train_step([batch])
    return trainer, batches


def make_step(extra: Sequence[str], shape: Shape):
    """A step, and how many target tokens it trains on, on average."""
    trainer, batches = make_trainer(extra, **shape._asdict())
    position = 0

    def step():
        nonlocal position
        trainer.train_step([batches[position % len(batches)]])
        position += 1

    return step, sum(batch['ntokens'] for batch in batches) // len(batches)


def step_suite(size: str = 'small') -> List[Table]:
    """PS-KD in fairseq."""
    shape = SHAPES[size]
    logging.disable(logging.INFO)
    try:
        steps = {name: make_step(extra, shape) for name, extra in METHODS.items()}
        tokens = {count for _, count in steps.values()}
        costs = compare({name: step for name, (step, _) in steps.items()}, repeats=1 if size == 'tiny' else 20)
    finally:
        logging.disable(logging.NOTSET)
    title = (
        f'A whole update of a Transformer of {shape.layers} + {shape.layers} layers, dimension {shape.dim}, vocabulary '
        f'{shape.vocabulary}, {shape.tokens} tokens{", mixed precision" if shape.amp else ""}.'
    )
    return [Table(title, costs, tokens.pop())]
