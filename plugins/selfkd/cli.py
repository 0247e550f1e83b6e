"""The command ``selfkd``: its commands are functions of the plugins, imported when they are called."""

import argparse
import inspect
import sys
from importlib import import_module
from typing import Optional, Sequence

__all__ = ['command_parser', 'main']

COMMANDS = {  # name: the function, what it does
    'report': ('selfkd_mmpretrain.report:main', 'compare finished runs of MMPretrain'),
    'report-detection': ('selfkd_mmdet.report:main', 'compare finished runs of MMDetection'),
}


def command_parser(name: str, documentation: Optional[str]) -> argparse.ArgumentParser:
    """A parser for ``selfkd NAME`` that shows the command's docstring as it is written."""
    description = inspect.cleandoc(documentation or '')
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f'selfkd {name}', description=description, formatter_class=formatter)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Calls the command that the first argument names with the others (by default those of the process)."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        'selfkd',
        description='Self-knowledge distillation. Each command has a --help of its own.',
        epilog='\n'.join(['commands:', *(f'  {name:{width}}  {help}' for name, (_, help) in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('command', choices=COMMANDS, metavar='COMMAND')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, metavar='...')
    args = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    module, function = COMMANDS[args.command][0].split(':')
    getattr(import_module(module), function)(args.arguments)
