"""The command ``selfkd``, where no toolkit is installed."""

import ast
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from selfkd.cli import COMMANDS, main


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match='0'):
        main(['--help'])
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if f' {name} ' not in shown] == []
    for arguments in ([], ['trian']):
        with pytest.raises(SystemExit, match='2'):
            main(arguments)
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_a_missing_toolkit_is_named_and_what_needs_none_works():
    code = "import sys; sys.modules['mmengine'] = None; from selfkd.cli import main; main(sys.argv[1:])"
    outcomes = [
        subprocess.run([sys.executable, '-c', code, *arguments], capture_output=True, text=True)
        for arguments in (['train', 'config.py'], ['publish', '--help'])
    ]
    assert [outcome.returncode for outcome in outcomes] == [1, 0]
    assert outcomes[0].stderr.strip() == 'selfkd train needs mmengine, which is not installed here'
    assert 'selfkd publish work_dirs/' in outcomes[1].stdout


def test_every_command_shows_an_example():
    """A line of the function's docstring, which --help shows; files that need a toolkit are only read."""
    for name, (where, _) in COMMANDS.items():
        module, function = where.split(':')
        tree = ast.parse((ROOT / 'plugins' / f'{module.replace(".", "/")}.py').read_text())
        (node,) = (part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name == function)
        assert f'selfkd {name}' in ast.get_docstring(node)


def test_env_names_versions_devices_and_toolkits(capsys):
    main(['env'])
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown['torch'] == torch.__version__
    assert {'selfkd', 'Python', 'CPU', 'mmengine', 'detectron2', 'transformers'} <= set(shown)


def test_env_imports_no_toolkit():
    code = "import sys, selfkd.environment as e; e.environment(); print({'mmengine', 'fairseq'} & set(sys.modules))"
    outcome = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == 'set()'


LONG = """
import sys, types
import selfkd.cli
command = types.SimpleNamespace(main=lambda arguments: print("x" * 10**6))  # more than a pipe holds
sys.modules["long"], selfkd.cli.COMMANDS["env"] = command, ("long:main", "")
selfkd.cli.main(["env"])
"""


def test_a_reader_that_has_enough_ends_a_command_quietly(tmp_path):
    (tmp_path / 'long.py').write_text(LONG)
    command = f'"{sys.executable}" "{tmp_path / "long.py"}" | head -c 1'
    outcome = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (outcome.stdout, outcome.stderr) == ('x', '')
