"""Measures what the methods cost, as ratios to the plain computation timed alternately in the same run.

    python tools/benchmark.py [SUITE ...] [--threads N] [--write docs/performance.md]
    python tools/benchmark.py --device cuda --size full [SUITE ...] [--write docs/performance.md]

--write puts each suite's tables into its section of the page.

glibc is told to keep the memory that a step frees, as a GPU's allocator does.
"""

import argparse
import os
import sys
from importlib import import_module

SUITES = {
    'memory': 'suites.counts:memory_suite',
    'kernels': 'suites.counts:kernel_suite',
    'syncs': 'suites.counts:sync_suite',
    'loss': 'suites.losses:loss_suite',
    'bank': 'suites.losses:bank_suite',
    'torch': 'suites.torch:step_suite',
    'mmpretrain': 'suites.mmpretrain:step_suite',
    'distillation': 'suites.mmpretrain:distillation_suite',
    'mmdet': 'suites.mmdet:step_suite',
    'detectron2': 'suites.detectron2:step_suite',
    'mmseg': 'suites.mmseg:step_suite',
    'fairseq': 'suites.fairseq:step_suite',
}

# Else most of it goes back to the system, and each pass pays for its pages anew: a past copy's pass, which frees its
# maps as it goes, more than the student's.
ALLOCATOR = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2**40)}


def parse_args() -> argparse.Namespace:
    """Exits with a message where a suite or a GPU is asked for that is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'suites', nargs='*', metavar='SUITE', help=f'of {", ".join(SUITES)} (default: all whose toolkit is installed)'
    )
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: cuda, where torch finds a GPU')
    parser.add_argument(
        '--size', choices=('small', 'full'), default='small', help='full: the shapes that people train, for a GPU'
    )
    parser.add_argument('--threads', type=int, help="torch's threads (default: as torch chooses)")
    parser.add_argument('--write', metavar='PAGE', help='Markdown page whose sections are replaced')
    args = parser.parse_args()
    unknown = set(args.suites) - set(SUITES)
    if unknown:
        parser.error(f'no suite {sorted(unknown)}; there are {list(SUITES)}')

    os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # the profiler, which counts memory, is talkative
    if args.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the toolkits' trainers choose the device by themselves
    import torch

    if not torch.cuda.is_available() and (args.device == 'cuda' or args.device is None and args.size == 'full'):
        option = '--device cuda' if args.device == 'cuda' else '--size full without --device cpu'
        parser.error(f'{option} needs a GPU that torch {torch.__version__} can use, and none is here')
    return args


def main() -> None:
    args = parse_args()
    import torch
    from costs import to_markdown, write_section

    if args.threads:
        torch.set_num_threads(args.threads)
    for name in args.suites or SUITES:
        module, function = SUITES[name].split(':')
        try:
            suite = getattr(import_module(module), function)
        except ModuleNotFoundError as error:
            if args.suites:
                raise
            print(f'## {name}\n\nLeft out: {error}.\n')
            continue
        text = '\n\n'.join(to_markdown(table) for table in suite(args.size))
        counted = suite.__module__ == 'suites.counts'  # one size, which needs no GPU
        section = name if args.size == 'small' or counted else f'{name}-full'
        print(f'## {section}\n\n{text}\n', flush=True)
        if args.write:
            write_section(args.write, section, text)


if __name__ == '__main__':
    if not ALLOCATOR.items() <= os.environ.items():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    main()
