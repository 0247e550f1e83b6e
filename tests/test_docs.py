"""Code blocks of the documentation run as they stand."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from conftest import ROOT

BLOCKS = [
    (path.name, i, code)
    for path in sorted(ROOT.glob('docs/*.md'))
    for i, code in enumerate(re.findall(r'```python\n(.*?)```', path.read_text(), re.DOTALL))
    if 'import' in code
]


@pytest.mark.parametrize(('page', 'number', 'code'), BLOCKS, ids=lambda value: str(value)[:30])
def test_python_block_runs(page, number, code, tmp_path):
    for toolkit in ('lightning', 'transformers'):  # the other environment has them
        if f'selfkd_{toolkit}' in code and not find_spec(toolkit):
            pytest.skip(f'{toolkit} is not installed')
    outcome = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr


def test_no_relative_link_is_broken():
    for path in [ROOT / 'README.md', *ROOT.glob('docs/*.md')]:
        for link in re.findall(r'\]\(([^)#]+)\)', path.read_text()):
            if '://' not in link:
                assert (path.parent / link).exists(), f'{path.name}: {link}'
