"""The command ``selfkd``, where no toolkit is installed."""

import subprocess
import sys

import pytest

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
