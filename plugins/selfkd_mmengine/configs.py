"""The configs that come with our packages, by name: ``selfkd_mmpretrain::pskd/resnet18-w16_1xb50_digits.py``."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, Sequence

from mmengine.config import Config
from mmengine.config.config import ConfigParsingError
from mmengine.config.utils import MODULE2PACKAGE

from selfkd.cli import command_parser, refusing

__all__ = ['config_path', 'load_config', 'refuse_lost_hooks']

PACKAGES = ('selfkd_mmpretrain', 'selfkd_mmdet', 'selfkd_mmseg')


def config_path(name: str) -> str:
    """The file of a config: of ``PACKAGE::PATH`` the one that came with the package, otherwise ``name`` itself.

    Args:
        name: the package is one of ours, or a toolkit that is installed: ``mmpretrain::resnet/resnet18_8xb32_in1k.py``.

    Raises:
        FileNotFoundError: the package is not there, or brings no such config.
    """
    package, colons, path = name.partition('::')
    if not colons:
        return name
    if not package.isidentifier() or not getattr(find_spec(package), 'origin', None):
        raise FileNotFoundError(f'{name}: there is no package {package} here')
    file = _folder(package) / path
    if not file.is_file():
        where = '`selfkd config` lists those there are' if package in PACKAGES else f'look in {_folder(package)}'
        raise FileNotFoundError(f'{name}: no such config, {where}')
    return str(file)


def load_config(name: str) -> Config:
    """Reads a config that may be one of ours, and may inherit from ours: ``_base_ = ['mine.py', 'PACKAGE::PATH']``.

    mmengine's own ``Config.fromfile`` takes ``::`` only for a list of packages that it holds. It also notes the package
    on what it reads from there, as the registry to look for types in; ours are no registries, so types are looked for
    as in the config that inherits.

    Raises:
        FileNotFoundError: it is not there, or a config that it inherits from.
        ValueError: it is cut, or no config; two of its bases set the same key.
    """
    MODULE2PACKAGE.update(zip(PACKAGES, PACKAGES))
    file = config_path(name)
    try:
        cfg = Config.fromfile(file)
    except (SyntaxError, UnicodeDecodeError, ConfigParsingError) as error:
        raise ValueError(f'{file}: is no config, or not a whole one ({error})') from error
    except KeyError as error:
        if 'Duplicate key' not in str(error):
            raise
        hint = ': instead of the fragment with our hook write default_hooks = dict(NAME=dict(type=...)), which adds to '
        hint = f'{hint}the hooks there are' if 'custom_hooks' in str(error) else ''
        raise ValueError(f'{file}: two of its _base_ set the same key. {error.args[0]}{hint}') from error
    _drop_scopes(cfg)
    return cfg


def refuse_lost_hooks(name: str) -> None:
    """A config that adds our hook by ``custom_hooks``, and with that line drops the hooks of the config below it.

    mmengine puts a list in place of the list that was there: without a word an EMAHook of the zoo's config is gone.

    Raises:
        ValueError: which hooks are lost, and how to add ours instead.
    """
    file = config_path(name)
    hooks = _hooks(load_config(file))
    for base in _bases(file):
        theirs = _hooks(load_config(base))
        lost = [name for name, kind in theirs.items() if name not in hooks and 'selfkd' not in kind]
        if lost and any('selfkd' in kind for kind in hooks.values()):
            raise ValueError(
                f'{file}: custom_hooks takes the place of the list in {base}, so training would be without '
                f'{", ".join(lost)}: write default_hooks = dict(NAME=dict(type=...)) for our hook, which adds to the '
                'hooks there are (if those are to go, custom_hooks = [] beside it says so)'
            )
        refuse_lost_hooks(base)


def _hooks(cfg: Config) -> Dict[str, str]:
    """The custom hooks: name of the class -> its name with its module or registry before it."""
    kinds: List[Any] = [hook.get('type') for hook in cfg.get('custom_hooks') or [] if isinstance(hook, dict)]
    names = [kind if isinstance(kind, str) else f'{kind.__module__}.{kind.__name__}' for kind in kinds]
    return {name.split('.')[-1]: name for name in names}


def _bases(file: str) -> List[str]:
    """The files that a config inherits from directly, in mmengine's old style and in its new one."""
    if not Config._is_lazy_import(file):
        return [Config._get_cfg_path(base, file)[0] for base in Config._get_base_files(file)]
    bases = []
    for module in Config._get_base_modules(ast.parse(Path(file).read_text(encoding='utf-8')).body):
        dots = len(module) - len(module.lstrip('.'))
        if dots:
            bases.append(str(Path(file).resolve().parents[dots - 1].joinpath(*module[dots:].split('.'))) + '.py')
        else:
            bases.append(_origin(module))
    return bases


def _folder(package: str) -> Path:
    return Path(_origin(package)).parent / '.mim/configs'


def _origin(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return spec.origin


def _drop_scopes(value: object) -> None:
    if isinstance(value, (dict, Config)):
        if value.get('_scope_') in PACKAGES:
            del value['_scope_']
        value = [entry for _, entry in value.items()]
    if isinstance(value, (list, tuple)):
        for entry in value:
            _drop_scopes(entry)


def main(arguments: Sequence[str]) -> None:
    """Prints the path of one of our configs, for tools that take a file.

        selfkd config
        mim train mmpretrain $(selfkd config selfkd_mmpretrain::pskd/resnet18-w16_1xb50_digits.py)

    Without a name it lists the configs that come with the packages.
    """
    parser = command_parser('config', main.__doc__)
    parser.add_argument('name', nargs='?', metavar='PACKAGE::PATH')
    args = parser.parse_args(arguments)
    if args.name:
        with refusing(parser):
            file = config_path(args.name)
            if not Path(file).is_file():
                raise FileNotFoundError(f'{file}: no such file; a config of a package is PACKAGE::PATH')
        print(file)
        return
    for package in PACKAGES:
        folder = _folder(package)
        print(
            *(f'{package}::{path.relative_to(folder).as_posix()}' for path in sorted(folder.glob('**/*.py'))), sep='\n'
        )
