"""What a training step with PS-KD costs in time and memory, against fairseq's label_smoothed_cross_entropy.

The criteria take turns on the same batches in one process, so that other load on the machine falls on all alike.
"""

import argparse
import statistics
import time
from typing import Dict, List

import torch
from fairseq import criterions, options, tasks
from fairseq.data import Dictionary, LanguagePairDataset, ListDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

VANILLA = 'label_smoothed_cross_entropy'
CASES = {
    VANILLA: [],
    'pskd snapshot': ['--pskd-past', 'snapshot'],
    'pskd bank': ['--pskd-past', 'bank'],
}


def make_trainer(extra, vocabulary: int, dim: int, layers: int, tokens: int, sentences: int, device: str):
    """A real Trainer on random sentences of 10 to 40 tokens, at the beginning of epoch 2."""
    criterion = f'pskd_{VANILLA}' if extra else VANILLA
    heads = max(dim // 64, 1)
    args = ['no-data', '--task', 'translation', '--arch', 'transformer', '--criterion', criterion, *extra]
    args += ['--label-smoothing', '0.1', '--optimizer', 'adam', '--lr', '1e-4', '--max-epoch', '10']
    args += ['--max-tokens', str(tokens), '--dropout', '0.1', '--share-decoder-input-output-embed', '--seed', '1']
    for side in ('encoder', 'decoder'):
        args += [f'--{side}-layers', str(layers), f'--{side}-embed-dim', str(dim)]
        args += [f'--{side}-ffn-embed-dim', str(4 * dim), f'--{side}-attention-heads', str(heads)]
    args += ['--cpu'] if device == 'cpu' else []
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
    task = tasks.translation.TranslationTask(cfg.task, words, words)
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


def benchmark(
    vocabulary: int = 10000,
    dim: int = 256,
    layers: int = 3,
    tokens: int = 2000,
    sentences: int = 400,
    rounds: int = 3,
    device: str = 'cpu',
) -> List[Dict]:
    """Compares the criteria on a Transformer of ``layers`` + ``layers`` layers.

    Returns:
        a row per case: ``name``, ``ms`` (median of a training step, optimizer included), ``time`` (median over the steps of
        its ratio to the vanilla criterion's step on the same batch), ``memory`` (ratio of the peak of memory allocated
        during a step, model, gradients and optimizer state not counted), ``extra_logits`` (how many
        [tokens, vocabulary] tensors that peak is higher by).
    """
    size = (vocabulary, dim, layers, tokens, sentences, device)
    trainers, batches = {}, None
    for name, extra in CASES.items():
        trainers[name], batches = make_trainer(extra, *size)
    times = {name: [] for name in CASES}
    for i in range(rounds * len(batches)):
        order = list(CASES)[i % len(CASES) :] + list(CASES)[: i % len(CASES)]
        for name in order:
            times[name].append(step_time(trainers[name], batches[i % len(batches)], device))
    largest = max(batches, key=lambda batch: batch['target'].numel())
    peaks = {name: step_memory(trainers[name], largest, device) for name in CASES}
    logits_bytes = largest['target'].numel() * vocabulary * 4
    return [
        {
            'name': name,
            'ms': 1000 * statistics.median(times[name]),
            'time': statistics.median(t / v for t, v in zip(times[name], times[VANILLA])),
            'memory': peaks[name] / peaks[VANILLA],
            'extra_logits': (peaks[name] - peaks[VANILLA]) / logits_bytes,
        }
        for name in CASES
    ]


def step_time(trainer, batch, device: str) -> float:
    start = time.perf_counter()
    trainer.train_step([batch])
    if device != 'cpu':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step_memory(trainer, batch, device: str) -> int:
    """Bytes allocated at the peak of a step, over what is allocated before it."""
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.train_step([batch])
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train_step([batch])
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == '[memory]':
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in zip(benchmark.__code__.co_varnames, benchmark.__defaults__):
        parser.add_argument(f'--{name}', type=type(default), default=default)
    for row in benchmark(**vars(parser.parse_args())):
        print(
            f'{row["name"]:30} {row["ms"]:8.1f} ms   time x{row["time"]:.3f}   memory x{row["memory"]:.3f} '
            f'({row["extra_logits"]:+.2f} [tokens, vocabulary] tensors)'
        )


if __name__ == '__main__':
    main()
