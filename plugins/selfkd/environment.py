"""The command ``selfkd env``: what a bug report needs."""

import importlib.metadata
import os
import platform
from importlib.util import find_spec
from typing import Dict, Sequence

import torch

from .cli import command_parser

__all__ = ['environment', 'main']

TOOLKITS = {  # name of the module: of the packages that bring it
    'mmengine': ('mmengine',),
    'mmcv': ('mmcv', 'mmcv-lite'),
    'mmpretrain': ('mmpretrain',),
    'mmdet': ('mmdet',),
    'mmseg': ('mmsegmentation',),
    'detectron2': ('detectron2',),
    'fairseq': ('fairseq', 'fairseq-fixed'),
    'lightning': ('lightning',),
    'transformers': ('transformers',),
    'accelerate': ('accelerate',),
}


def environment() -> Dict[str, str]:
    """Versions, devices and toolkits of this machine. No toolkit is imported."""
    found = {
        'selfkd': _version('selfkd'),
        'Python': f'{platform.python_version()}, {platform.platform()}',
        'torch': torch.__version__,
        'NumPy': _version('numpy') if find_spec('numpy') else 'not installed',
        'CPU': f'{os.cpu_count()} cores, {torch.get_num_threads()} threads',
        'CUDA': f'torch was built for {torch.version.cuda or "none"}',
    }
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found[f'GPU {index}'] = f'{torch.cuda.get_device_name(index)}, {memory:.0f} GiB'
    if not torch.cuda.device_count():
        found['GPU'] = 'none'
    for module, packages in TOOLKITS.items():
        found[module] = _version(*packages) if find_spec(module) else 'not installed'
    return found


def _version(*packages: str) -> str:
    """Of the packages that are installed."""
    versions = []
    for package in packages:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        versions.append(version if len(packages) == 1 else f'{package} {version}')
    return ', '.join(versions) or 'version unknown (not installed as a package)'


def main(arguments: Sequence[str]) -> None:
    """Prints versions, devices and the toolkits found.

        selfkd env

    Put it into a bug report. It imports no toolkit.
    """
    command_parser('env', main.__doc__).parse_args(arguments)
    found = environment()
    width = max(map(len, found))
    for name, value in found.items():
        print(f'{name:{width}}  {value}')
