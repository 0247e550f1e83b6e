"""Finished translation models side by side: quality of what they translate, likelihood and calibration of tokens."""

import math
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

import torch
from fairseq import checkpoint_utils, utils
from torch import Tensor

from selfkd.cli import command_parser, refusing
from selfkd.comparison import Column, check_seeds
from selfkd.files import load
from selfkd.metrics import apply_temperature, calibration_error_of, confidence_of, fit_temperature, nll
from selfkd.runs import parse_groups, write_table

__all__ = ['measure', 'translations']

COLUMNS = {  # title: measure, factor, decimals, which is better
    'BLEU': Column('bleu', 1, 1, 'higher'),
    'chrF': Column('chrf', 1, 1, 'higher'),
    'NLL, bits a token': Column('nll', 1, 3, 'lower'),
    'ECE %': Column('ece', 100, 2, 'lower'),
    'temperature': Column('temperature', 1, 2, None),
    'NLL scaled': Column('nll_scaled', 1, 3, 'lower'),
    'ECE % scaled': Column('ece_scaled', 100, 2, 'lower'),
}
LOGITS = 20_000_000  # of the validation set, to which the temperature is fitted: 80 MB


def measure(
    checkpoint: str, data: str, *, subset: str = 'test', beam: int = 5, max_tokens: int = 4000, bpe: str = '@@ '
) -> Dict[str, float]:
    """Translates a subset with a checkpoint, and scores it and the tokens of the reference.

    Args:
        data: the folder of ``fairseq-preprocess``.
        max_tokens: in a batch.
        bpe: what fairseq calls ``--remove-bpe``: the mark at the end of a piece of a word, or ``'sentencepiece'``.

    Returns:
        ``bleu`` and ``chrf`` (sacrebleu, of words as ``fairseq-generate --remove-bpe`` prints them), ``nll`` in bits a
        token and ``ece`` (a share, 10 bins) of the reference's tokens, both again with the ``temperature`` that fits
        the validation set (as many batches of it, drawn at random, as have 20 million logits), and ``seed`` of the
        training.
    """
    import sacrebleu

    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], arg_overrides={'data': data})
    model.eval().to('cuda' if torch.cuda.is_available() else 'cpu')
    hypotheses, references = translations(model, cfg, task, subset, beam, max_tokens, bpe)
    kept: List[Tuple[Tensor, Tensor]] = []
    for lprobs, target in _tokens(model, task, 'valid', max_tokens):
        kept.append((lprobs, target))
        if sum(seen.numel() for seen, _ in kept) > LOGITS:
            break
    temperature = fit_temperature(*(torch.cat(part) for part in zip(*kept)))
    measures = {
        'bleu': sacrebleu.corpus_bleu(hypotheses, [references]).score,
        'chrf': sacrebleu.corpus_chrf(hypotheses, [references]).score,
        'temperature': temperature,
        'seed': cfg.common.seed,
    }
    for suffix, by in (('', 1.0), ('_scaled', temperature)):
        nats, scored = 0.0, []
        for lprobs, target in _tokens(model, task, subset, max_tokens):
            probs = apply_temperature(lprobs.exp(), by)
            nats += nll(probs, target) * len(target)
            scored.append(confidence_of(probs, target))
        confidence, correct = (torch.cat(part) for part in zip(*scored))
        measures[f'nll{suffix}'] = nats / len(correct) / math.log(2)
        measures[f'ece{suffix}'] = calibration_error_of(confidence, correct)
    return measures


@torch.no_grad()
def translations(model, cfg, task, subset: str, beam: int, max_tokens: int, bpe: str) -> Tuple[List[str], List[str]]:
    """What the model translates a subset to, and the references, in words, in the order of the batches."""
    cfg.generation.beam = beam
    generator = task.build_generator([model], cfg.generation)
    words = task.target_dictionary
    ours, theirs = [], []
    for sample in _batches(model, task, subset, max_tokens):
        found = task.inference_step(generator, [model], sample)
        ours += [words.string(beams[0]['tokens'].int().cpu(), bpe) for beams in found]
        # Of the reference an unknown word is written otherwise, so that it is never counted as found.
        rows = [row[row.ne(words.pad())].int().cpu() for row in sample['target']]
        theirs += [words.string(row, bpe, escape_unk=True) for row in rows]
    return ours, theirs


@torch.no_grad()
def _tokens(model, task, subset: str, max_tokens: int) -> Iterator[Tuple[Tensor, Tensor]]:
    """Log-probabilities ``[N, V]`` and ids ``[N]`` of the reference's tokens, batch by batch."""
    for sample in _batches(model, task, subset, max_tokens):
        lprobs = model.get_normalized_probs(model(**sample['net_input']), log_probs=True).float()
        real = sample['target'].ne(task.target_dictionary.pad())
        yield lprobs[real].cpu(), sample['target'][real].cpu()


def _batches(model, task, subset: str, max_tokens: int) -> Iterator[dict]:
    if subset not in task.datasets:
        task.load_dataset(subset)
    longest = utils.resolve_max_positions(task.max_positions(), model.max_positions())
    batches = task.get_batch_iterator(task.dataset(subset), max_tokens=max_tokens, max_positions=longest)
    for sample in batches.next_epoch_itr(shuffle=True):
        yield utils.move_to_cuda(sample) if torch.cuda.is_available() else sample


def main(arguments: Sequence[str]) -> None:
    """Compares finished translation models of fairseq: BLEU, chrF, NLL and calibration.

        selfkd report-translation OUT DATA NAME=SAVE_DIR[,SAVE_DIR...] [NAME=...]

        selfkd report-translation work_dirs/report data/messages/bin plain=work_dirs/plain-1 PS-KD=work_dirs/pskd-1

    Runs given under one name are averaged (seeds), and compared with those of the first name, seed by seed.
    """
    parser = command_parser('report-translation', main.__doc__)
    parser.add_argument('out', help='folder for table.md and runs.csv')
    parser.add_argument('data', help='folder of fairseq-preprocess')
    parser.add_argument('--checkpoint', default='checkpoint_last.pt', help='file in each SAVE_DIR (%(default)s)')
    parser.add_argument('--beam', type=int, default=5, help='(%(default)s)')
    parser.add_argument('--remove-bpe', default='@@ ', help="as in fairseq-generate, say sentencepiece ('%(default)s')")
    args, save_dirs = parse_groups(parser, arguments)
    files = {name: [Path(folder, args.checkpoint) for folder in folders] for name, folders in save_dirs.items()}
    with refusing(parser):  # before the first is tested
        if not Path(args.data).is_dir():
            raise FileNotFoundError(f'{args.data}: is no folder; DATA is what fairseq-preprocess wrote')
        check_seeds({name: [_seed(file) for file in group] for name, group in files.items()})
    measured = {
        name: [measure(str(file), args.data, beam=args.beam, bpe=args.remove_bpe) for file in group]
        for name, group in files.items()
    }
    with refusing(parser):
        print(f'{write_table(args.out, measured, COLUMNS)}\n\nwrote {args.out}')


def _seed(file: Path) -> Dict[str, float]:
    """Of the training that left a checkpoint; OSError or ValueError where that cannot be read."""
    checkpoint = load(file)
    if not isinstance(checkpoint, dict) or not {'model', 'cfg'} <= set(checkpoint):
        raise ValueError(f'{file}: is no checkpoint of fairseq')
    return {'seed': checkpoint_utils.load_checkpoint_to_cpu(str(file))['cfg'].common.seed}
