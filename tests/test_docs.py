"""Code blocks of the documentation run as they stand."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from helpers import ROOT
from helpers.processes import run_script

BLOCKS = [
    (path.name, i, code)
    for path in [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]
    for i, code in enumerate(re.findall(r'```python\n(.*?)```', path.read_text(), re.DOTALL))
    if 'import' in code
]

METHODS = ('pskd', 'cskd', 'frskd', 'comparators')
TOOLKITS = (
    'mmpretrain',
    'mmdet',
    'mmseg',
    'detectron2',
    'fairseq',
    'torch',
    'lightning',
    'transformers',
)
SECTIONS = ['What it does', 'Switch it on', 'Options', 'Cost', 'What combines', 'Evidence']
TOOLKIT_SECTIONS = [*SECTIONS[1:5], 'What it does', 'Evidence']  # what to type comes first


@pytest.mark.parametrize(('page', 'number', 'code'), BLOCKS, ids=lambda value: str(value)[:30])
def test_python_block_runs(page, number, code, tmp_path):
    for toolkit in ('lightning', 'transformers'):  # the other environment has them
        if f'selfkd_{toolkit}' in code and not find_spec(toolkit):
            pytest.skip(f'{toolkit} is not installed')
    outcome = run_script('-c', code, folder=tmp_path)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize('page', METHODS + TOOLKITS)
def test_page_of_a_method_or_toolkit_has_the_same_sections(page):
    text = re.sub(r'^ *```.*?^ *```', '', (ROOT / f'docs/{page}.md').read_text(), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r'^## (.*)', text, re.MULTILINE) == (SECTIONS if page in METHODS else TOOLKIT_SECTIONS)
    parts = re.split(r'^##? .*', text, flags=re.MULTILINE)
    assert all(len(part.split()) > 10 for part in parts[2:])  # behind the text before the title, and the introduction


def test_every_plugin_has_a_page():
    pages = '\n'.join((ROOT / f'docs/{page}.md').read_text() for page in TOOLKITS)
    for plugin in ROOT.glob('plugins/selfkd_*/__init__.py'):
        assert plugin.parent.name in pages


def test_every_page_is_in_the_sites_navigation():
    navigation = (ROOT / 'mkdocs.yml').read_text()
    for page in ROOT.glob('docs/*.md'):
        assert f': {page.name}\n' in navigation


@pytest.mark.parametrize('page', ['README.md', 'docs/pskd.md', 'docs/mmpretrain.md', 'docs/mmdet.md'])
def test_the_form_that_keeps_a_configs_own_hooks_comes_first(page):
    """A list custom_hooks would take the place of the one that a config inherits."""
    text = (ROOT / page).read_text()
    assert 'default_hooks' in text
    assert text.index('default_hooks') < (text + 'custom_hooks').index('custom_hooks')


def test_no_relative_link_is_broken():
    for path in [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]:
        for link in re.findall(r'\]\(([^)#]+)\)', path.read_text()):
            if '://' not in link:
                assert (path.parent / link).exists(), f'{path.name}: {link}'


@pytest.mark.parametrize('toolkit', ['detectron2', 'fairseq', 'lightning', 'transformers'])
def test_contributing_names_each_place_that_knows_a_toolkit(toolkit):
    """Code and settings outside the toolkit's own files, in which it is named elsewhere than in comments and
    docstrings."""
    section = (ROOT / 'CONTRIBUTING.md').read_text().split('## Add a toolkit')[1].split('\n## ')[0]
    kinds = ['*.py', '*.toml', '*.yml', '*.sh', '*Makefile', 'requirements/*', ':!tests', ':!docs', f':!*{toolkit}*']
    listed = subprocess.run(['git', 'ls-files', *kinds], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in listed.stdout.split() if (ROOT / name).is_file()]
    assert len(files) > 100
    for name in files:
        code = re.sub(r'""".*?"""|#[^\n]*', '', (ROOT / name).read_text(), flags=re.DOTALL)
        places = (name, name.replace('plugins/selfkd', 'selfkd'), f'{name.split("/")[0]}/')
        assert toolkit not in code or any(f'`{place}`' in section for place in places), name


def test_the_method_that_contributing_adds_keeps_the_promises(tmp_path):
    """The five code blocks, put where the page says, in a copy of what the tests need."""
    for folder in ('plugins', 'tests', 'configs', 'tools'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    page = (ROOT / 'CONTRIBUTING.md').read_text()
    steps = re.findall(r'^\*\*\d\. .*?`([\w/]+\.py)`.*?```python\n(.*?)```', page, re.DOTALL | re.MULTILINE)
    before = set(tmp_path.rglob('*.py'))
    for name, code in steps:
        path = tmp_path / name
        text = path.read_text() if path.exists() else ''
        if name.endswith('__init__.py'):
            text = text.replace('\n\n__all__', f'\n{code}\n__all__', 1)
        elif name.endswith('table.py'):
            text = text.replace('ROWS = [\n', f'ROWS = [\n{code}', 1)
        else:
            text += f'\n\n{code}' if text else code
        path.write_text(text)
    assert len(steps) == 5
    assert len(set(tmp_path.rglob('*.py')) - before) == 2
    tests = ['plugins/selfkd/losses/comparators.py', 'tests/promises/test_promises.py']
    tests.append('tests/selfkd_mmpretrain/test_confidence_penalty_hook.py')
    # Of the promises the quick ones: whoever adds a row runs them all.
    chosen = 'confidence_penalty or confidence and (acts or method_twice or fire)'
    outcome = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', *tests, '-k', chosen],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(tmp_path / 'plugins')},
    )
    assert outcome.returncode == 0, outcome.stdout[-6000:]
    assert '5 passed' in outcome.stdout


def test_readme_is_short_and_says_how_to_begin():
    lines = (ROOT / 'README.md').read_text().split('\n')
    assert len(lines) <= 91
    assert lines.index('```python') < 25


def test_the_version_is_the_same_everywhere():
    places = {
        'pyproject.toml': 'version = "',
        'CITATION.cff': r'\nversion: ',
        'plugins/selfkd/__init__.py': "version__ = '",
    }
    found = {re.search(rf'{text}([\w.]+)', (ROOT / name).read_text())[1] for name, text in places.items()}
    assert len(found) == 1
    assert f'({found.pop()})' in (ROOT / 'CHANGELOG.md').read_text()
