"""Trains and measures one run of an experiment on translation with fairseq: see experiments.py for the settings.

The data folder holds `multi30k/data/task1/raw/*.gz`.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Sequence

from corpora import LANGUAGES, find, multi30k, read_lines, tokenised_pairs, write_splits

ROOT = Path(__file__).resolve().parent.parent
WORDS = 4000  # merges of the byte-pair encoding
RAW = 'multi30k/data/task1/raw'
SETS = {'test': '', 'test1': '_2017'}  # fairseq's name: what is added to its measures' names
MODEL = """--arch transformer --share-all-embeddings --encoder-layers 2 --decoder-layers 2
    --encoder-embed-dim 128 --decoder-embed-dim 128 --encoder-ffn-embed-dim 512 --decoder-ffn-embed-dim 512
    --encoder-attention-heads 4 --decoder-attention-heads 4"""
TRAINING = """--cpu --num-workers 0 --required-batch-size-multiple 1 --max-tokens 2000 --clip-norm 1.0
    --optimizer adam --adam-betas (0.9,0.98) --lr 0.002 --lr-scheduler inverse_sqrt --warmup-updates 400
    --no-epoch-checkpoints --best-checkpoint-metric nll_loss --no-progress-bar"""


def prepare(folder: str) -> Path:
    """Encodes the sentences and makes fairseq's files of them, once: their folder.

    Raises:
        FileNotFoundError: the folder does not hold the data; the message says how to get them.
    """
    root = Path(folder)
    place = root / 'multi30k-bin'
    if place.exists():
        return place
    if not (root / RAW).is_dir():
        raise FileNotFoundError(
            f'{root}: must hold {RAW}:\n  git clone https://github.com/multi30k/dataset {root}/multi30k'
        )
    splits = multi30k(root / RAW)
    splits['test1'] = tokenised_pairs(
        *(read_lines(find(root / RAW, f'test_2017_flickr.{lang}*')) for lang in LANGUAGES)
    )
    with tempfile.TemporaryDirectory(dir=root) as beside:
        write_splits(splits, Path(beside), bpe_tokens=WORDS)
        pairs = {'train': 'train', 'valid': 'valid', 'test': f'test,{beside}/test1'}
        prefixes = [word for part, name in pairs.items() for word in (f'--{part}pref', f'{beside}/{name}')]
        languages = ['--source-lang', 'en', '--target-lang', 'de', '--joined-dictionary']
        _fairseq('preprocess', *languages, *prefixes, '--destdir', f'{beside}/bin')
        os.replace(f'{beside}/bin', place)
    return place


def run(folder: str, settings: dict, seed: int) -> dict:
    """Trains one Transformer and measures it.

    Args:
        folder: with the data.
        settings: ``epochs``, ``dropout``, and ``args``: the criterion and its options, as on fairseq-train's command
            line.
        seed: of the first weights, the order and the dropout.

    Returns:
        ``measures`` (of ``selfkd report-translation``; ``bleu_2017`` and ``chrf_2017`` are of the second test set) of
        the ``last`` weights and of those of the lowest held-out NLL (``early``), and ``seconds``: of a core's time.
    """
    data, started = prepare(folder), _seconds()
    words = f'--user-dir {ROOT / "plugins/selfkd_fairseq"} {MODEL} {TRAINING} {settings["args"]}'.split()
    words += ['--max-epoch', settings['epochs'], '--dropout', settings['dropout'], '--seed', seed]
    with tempfile.TemporaryDirectory() as save_dir:
        _fairseq('train', data, *words, '--save-dir', save_dir)
        measures = {
            when: _measure(f'{save_dir}/checkpoint_{name}.pt', data)
            for when, name in (('last', 'last'), ('early', 'best'))
        }
    return dict(measures=measures, seconds=_seconds() - started)


def _measure(checkpoint: str, data: Path) -> Dict[str, float]:
    from selfkd_fairseq.report import measure

    found: Dict[str, float] = {}
    for subset, suffix in SETS.items():
        of_set = measure(checkpoint, str(data), subset=subset)
        found.update({f'{name}{suffix}': of_set[name] for name in ('bleu', 'chrf') if suffix} or of_set)
    return found


def _seconds() -> float:
    """Of a core's time, of this process and of those that it has waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _fairseq(program: str, *words: object) -> None:
    """RuntimeError with the end of what the program printed, if it fails."""
    command: Sequence[str] = [sys.executable, '-m', f'fairseq_cli.{program}', *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f'fairseq-{program}: {done.stdout[-3000:]}')
