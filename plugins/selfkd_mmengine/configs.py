"""The configs that come with our packages, by name: ``selfkd_mmpretrain::pskd/resnet18-w16_1xb50_digits.py``."""

from importlib.util import find_spec
from pathlib import Path
from typing import Sequence

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from selfkd.cli import command_parser

__all__ = ['config_path', 'load_config']

PACKAGES = ('selfkd_mmpretrain', 'selfkd_mmdet', 'selfkd_mmseg')


def config_path(name: str) -> str:
    """The file of a config: of ``PACKAGE::PATH`` the one that came with the package, otherwise ``name`` itself.

    Raises:
        FileNotFoundError: the package brings no such config.
    """
    package, colons, path = name.partition('::')
    if not colons or package not in PACKAGES:
        return name
    file = _folder(package) / path
    if not file.is_file():
        raise FileNotFoundError(f'{name}: no such config, `selfkd config` lists those there are')
    return str(file)


def load_config(name: str) -> Config:
    """Reads a config that may be one of ours, and may inherit from ours: ``_base_ = ['mine.py', 'PACKAGE::PATH']``.

    mmengine's own ``Config.fromfile`` takes ``::`` only for a list of packages that it holds. It also notes the package
    on what it reads from there, as the registry to look for types in; ours are no registries, so types are looked for
    as in the config that inherits.
    """
    MODULE2PACKAGE.update(zip(PACKAGES, PACKAGES))
    cfg = Config.fromfile(config_path(name))
    _drop_scopes(cfg)
    return cfg


def _folder(package: str) -> Path:
    return Path(find_spec(package).origin).parent / '.mim/configs'


def _drop_scopes(value: object) -> None:
    if isinstance(value, (dict, Config)):
        if value.get('_scope_') in PACKAGES:
            del value['_scope_']
        value = [entry for _, entry in value.items()]
    if isinstance(value, (list, tuple)):
        for entry in value:
            _drop_scopes(entry)


def main(arguments: Sequence[str]) -> None:
    """Prints where a config of ours lies, for tools that take a file; without a name, lists them all.

    mim train mmpretrain $(selfkd config selfkd_mmpretrain::pskd/resnet18-w16_1xb50_digits.py)
    """
    parser = command_parser('config', main.__doc__)
    parser.add_argument('name', nargs='?', metavar='PACKAGE::PATH')
    args = parser.parse_args(arguments)
    if args.name:
        try:
            print(config_path(args.name))
        except FileNotFoundError as error:
            parser.error(str(error))
        return
    for package in PACKAGES:
        folder = _folder(package)
        print(
            *(f'{package}::{path.relative_to(folder).as_posix()}' for path in sorted(folder.glob('**/*.py'))), sep='\n'
        )
