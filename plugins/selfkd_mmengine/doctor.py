"""The command ``selfkd doctor``."""

import copy
import re
import tempfile
from importlib import import_module
from typing import Any, Dict, Optional, Sequence

import torch
from mmengine.config import Config, DictAction

from selfkd.cli import command_parser, refusing

from .configs import load_config, refuse_lost_hooks
from .trial import METHODS, Outcome, classify, forget_weights, refusal, train

__all__ = ['diagnose', 'main', 'shortened']


def main(arguments: Sequence[str]) -> None:
    """Says which methods work with a config, which are refused, and why.

        selfkd doctor CONFIG [--batch-size N] [--cfg-options KEY=VALUE ...]

        selfkd doctor my_config.py --batch-size 2

    CONFIG is what `selfkd train` takes. The config is built as it is and trained for four steps on the first samples of
    its own training set, plain and with each method. It loads no weights and writes nothing. Missing data are named.
    A small --batch-size makes it quick. Times are of a single step (on CPUs of processor time), so they are rough.
    """
    parser = command_parser('doctor', main.__doc__)
    parser.add_argument('config')
    parser.add_argument('--batch-size', type=int, help="instead of the config's, for a quick look on a small machine")
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, help='settings that override the config'
    )
    args = parser.parse_args(arguments)
    with refusing(parser, ModuleNotFoundError):
        cfg = load_config(args.config)
        refuse_lost_hooks(args.config)
        cfg.merge_from_dict(args.cfg_options)
        with tempfile.TemporaryDirectory() as folder:
            cfg = shortened(cfg, folder, args.batch_size)
            toolkit, batch = cfg.default_scope, cfg.train_dataloader.batch_size
            print(f'{args.config} ({toolkit}): four steps of {batch} samples each', flush=True)
            plain = train(cfg)
            print(f'plain: {_first_line(plain.error) if plain.error else "works"}', flush=True)
            if plain.error:
                raise SystemExit(f'selfkd doctor: plain training of {args.config} does not run here, see above')
            for method, options in METHODS[toolkit].items():
                print(f'{method}: {diagnose(method, cfg, options, plain)}', flush=True)


def shortened(cfg: Config, folder: str, batch_size: Optional[int] = None) -> Config:
    """The config for two epochs of two steps on its own first samples, without weights to load, and plain.

    Args:
        cfg: is left as it is.
        folder: for what the run writes.
        batch_size: instead of the config's.

    Raises:
        ValueError: no config of MMPretrain, MMDetection or MMSegmentation that trains.
    """
    cfg = copy.deepcopy(cfg)
    toolkit = cfg.get('default_scope')
    if toolkit not in METHODS or not cfg.get('train_dataloader'):
        raise ValueError(
            f'selfkd doctor tries training configs of {", ".join(METHODS)}: default_scope is {toolkit!r}, and '
            f'train_dataloader is {"there" if cfg.get("train_dataloader") else "missing"}'
        )
    import_module(f'selfkd_{toolkit}')  # its classes, so that a fork need not import them
    forget_weights(cfg._cfg_dict)
    loader = cfg.train_dataloader
    loader.update(num_workers=0, persistent_workers=False, num_batch_per_epoch=2)
    loader['sampler'] = dict(type='DefaultSampler', shuffle=False)
    for name in ('prefetch_factor', 'batch_sampler'):
        loader.pop(name, None)
    loader.batch_size = batch_size or loader.get('batch_size', 1)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1000)
    for name in ('val', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{name}_{part}'] = None
    if not torch.cuda.is_available():  # mmengine's mixed precision wants an accelerator
        wrapper = cfg.optim_wrapper
        if wrapper.get('type') == 'AmpOptimWrapper':
            wrapper['type'] = 'OptimWrapper'
            for name in ('dtype', 'loss_scale', 'use_fp16'):
                wrapper.pop(name, None)
    cfg.param_scheduler, cfg.load_from, cfg.resume, cfg.launcher = None, None, False, 'none'
    cfg.auto_scale_lr = None
    hooks = {name: hook for name, hook in (cfg.get('default_hooks') or {}).items() if not _is_ours(hook)}
    cfg.default_hooks = dict(hooks, checkpoint=None)
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if not _is_ours(hook)]
    cfg.merge_from_dict({'work_dir': folder, 'log_level': 'ERROR', 'randomness': dict(seed=0)})
    return cfg


def diagnose(method: str, cfg: Config, options: Dict[str, Any], plain: Outcome) -> str:
    """What became of a shortened config with a method: ``works`` and how it is switched on, or why not."""
    switched = copy.deepcopy(cfg)
    switched.merge_from_dict(options)
    trained = train(switched)
    refused = refusal(method, trained)
    if refused:
        return refused
    outcome = classify(method, plain, trained)
    if outcome != 'trains':
        # Both are worth a look by whoever asks: the first samples of a class may have no partner, for one.
        return re.sub('^DEFECT: ', 'does not work: ', outcome)
    parts = ['works', trained.teacher, f'a step takes {trained.seconds / plain.seconds:.1f} times as long']
    if plain.bytes:
        parts.append(f'{trained.bytes / plain.bytes:.1f} times the memory')
    shown = ' '.join(f'{key}={value}' for key, value in options.items() if 'warmup' not in key)
    return f'{"; ".join(part for part in parts if part)}\n    --cfg-options {shown}'


def _is_ours(hook: object) -> bool:
    return isinstance(hook, dict) and 'selfkd' in str(hook.get('type'))


def _first_line(message: str) -> str:
    return message.strip().split('\n')[0]
