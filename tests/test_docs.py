"""Code blocks of the documentation run as they stand."""

import re
import subprocess
import sys

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
    outcome = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr


def test_no_relative_link_is_broken():
    for path in [ROOT / 'README.md', *ROOT.glob('docs/*.md')]:
        for link in re.findall(r'\]\(([^)#]+)\)', path.read_text()):
            if '://' not in link:
                assert (path.parent / link).exists(), f'{path.name}: {link}'
