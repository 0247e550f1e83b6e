"""The command ``selfkd``: its commands are functions of the plugins, imported when they are called."""

import argparse
import inspect
import os
import sys
from contextlib import contextmanager
from importlib import import_module
from typing import Iterator, Optional, Sequence, Tuple, Type

__all__ = ['command_parser', 'main', 'refusing']

COMMANDS = {  # name: the function, what it does
    'env': ('selfkd.environment:main', 'print versions, devices and the toolkits found, for a bug report'),
    'doctor': ('selfkd_mmengine.doctor:main', 'say which methods work with a config of OpenMMLab, and why not'),
    'train': ('selfkd_mmengine.train:main', 'train a config of MMPretrain, MMDetection or MMSegmentation'),
    'train-detectron2': ('selfkd_detectron2.train:main', 'train a config of Detectron2'),
    'config': ('selfkd_mmengine.configs:main', 'list the configs that come with the packages, or find one'),
    'compare': ('selfkd.runs:main', 'compare finished runs of OpenMMLab or Detectron2 by what they logged'),
    'report': ('selfkd_mmpretrain.report:main', 'test finished runs of MMPretrain and compare them'),
    'report-translation': ('selfkd_fairseq.report:main', 'translate with models of fairseq and compare them'),
    'publish': ('selfkd.publish:main', 'keep what inference needs of a checkpoint'),
    'convert-backbone': ('selfkd_mmpretrain.backbone:main', "turn MMPretrain's ResNet into the start of a detector"),
}
EXAMPLES = """
examples:
  selfkd doctor my_config.py --batch-size 2
  selfkd train my_config.py --cfg-options default_hooks.pskd.type=selfkd_mmpretrain.PSKDHook
  selfkd compare work_dirs/table plain=work_dirs/plain_0,work_dirs/plain_1 PS-KD=work_dirs/pskd_0,work_dirs/pskd_1"""


def command_parser(name: str, documentation: Optional[str]) -> argparse.ArgumentParser:
    """A parser for ``selfkd NAME`` that shows the command's docstring as it is written."""
    description = inspect.cleandoc(documentation or '')
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f'selfkd {name}', description=description, formatter_class=formatter)


@contextmanager
def refusing(parser: argparse.ArgumentParser, *others: Type[Exception]) -> Iterator[None]:
    """A file that cannot be read, written or used ends the command with the message alone, without a traceback.

    Such errors are OSError and ValueError, and ``others``.
    """
    refused: Tuple[Type[Exception], ...] = (OSError, ValueError, *others)
    try:
        yield
    except refused as error:
        parser.error(str(error))


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Calls the command that the first argument names with the others (by default those of the process)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    width = max(map(len, COMMANDS))
    listed = [f'  {name:{width}}  {does}' for name, (_, does) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        'selfkd',
        description='Self-knowledge distillation. `selfkd COMMAND --help` explains a command and shows an example.',
        epilog='\n'.join(['commands:', *listed, EXAMPLES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('command', choices=COMMANDS, metavar='COMMAND', help='one of those below')
    command = parser.parse_args(arguments[:1]).command
    module, function = COMMANDS[command][0].split(':')
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith('selfkd'):
            raise
        toolkit = error.name.split('.')[0]
        raise SystemExit(f'selfkd {command} needs {toolkit}, which is not installed here') from error
    try:
        getattr(found, function)(arguments[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; Python would flush once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
