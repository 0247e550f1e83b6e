"""What a training step with PS-KD costs against fairseq's label_smoothed_cross_entropy, in fairseq's own Trainer."""

import logging
from typing import List

import torch
from fairseq import criterions, options
from fairseq.data import Dictionary, LanguagePairDataset, ListDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer

from selfkd.benchmark import Cost, compare

__all__ = ['step_suite']

VANILLA = 'label_smoothed_cross_entropy'
CASES = {
    VANILLA: [],
    'PS-KD, snapshot': ['--pskd-past', 'snapshot'],
    'PS-KD, token bank': ['--pskd-past', 'bank'],
}


def make_trainer(
    extra,
    vocabulary: int = 10000,
    dim: int = 256,
    layers: int = 3,
    tokens: int = 2000,
    sentences: int = 300,
    dropout: float = 0.1,
    criterion: str = '',
):
    """A Trainer in its second epoch, where there is a past, and its batches of random sentences of 10 to 40 tokens."""
    criterion = criterion or (f'pskd_{VANILLA}' if extra else VANILLA)
    heads = max(dim // 64, 1)
    args = ['no-data', '--task', 'translation', '--arch', 'transformer', '--criterion', criterion, *extra]
    args += ['--label-smoothing', '0.1', '--optimizer', 'adam', '--lr', '1e-4', '--max-epoch', '10']
    args += [
        '--max-tokens',
        str(tokens),
        '--dropout',
        str(dropout),
        '--share-decoder-input-output-embed',
        '--seed',
        '1',
    ]
    for side in ('encoder', 'decoder'):
        args += [f'--{side}-layers', str(layers), f'--{side}-embed-dim', str(dim)]
        args += [f'--{side}-ffn-embed-dim', str(4 * dim), f'--{side}-attention-heads', str(heads)]
    args += [] if torch.cuda.is_available() else ['--cpu']
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), args))
    words = Dictionary()
    for i in range(vocabulary - len(words)):
        words.add_symbol(f'w{i}')
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 41, (sentences,), generator=generator).tolist()
    lines = [torch.randint(words.nspecial, len(words), (n,), generator=generator) for n in lengths]
    for line in lines:
        line[-1] = words.eos()
    text = ListDataset(lines, lengths)
    torch.manual_seed(1)
    task = TranslationTask(cfg.task, words, words)
    task.datasets['train'] = LanguagePairDataset(text, lengths, words, text, lengths, words)
    task.load_dataset = lambda *args, **kwargs: None
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


def make_step(extra):
    trainer, batches = make_trainer(extra)
    position = 0

    def step():
        nonlocal position
        trainer.train_step([batches[position % len(batches)]])
        position += 1

    return step


def step_suite() -> List[Cost]:
    """A whole update of a Transformer of 3 + 3 layers, dimension 256, vocabulary 10k, 2000 tokens."""
    logging.disable(logging.INFO)
    try:
        return compare({name: make_step(extra) for name, extra in CASES.items()})
    finally:
        logging.disable(logging.NOTSET)
