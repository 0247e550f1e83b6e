"""What is built installs, imports and trains, and the core brings in no toolkit."""

import ast
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from helpers import ROOT
from packaging.requirements import Requirement

TOOLKITS = {'mmpretrain', 'mmdet', 'mmseg', 'fairseq', 'detectron2', 'lightning', 'transformers'}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel built from a built sdist, as an index would have both, installed into a folder: (file, folder).

    The configs, which lie behind links in the clone, are in both.
    """
    folder = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    sdist = f'from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})'
    subprocess.run([sys.executable, '-c', sdist], check=True, capture_output=True, cwd=ROOT)
    (file,) = folder.glob('selfkd-*.tar.gz')
    build = [*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', str(folder), str(file)]
    subprocess.run(build, check=True, capture_output=True)
    (file,) = folder.glob('selfkd-*.whl')
    install = [*pip, 'install', '--no-deps', '--target', str(folder / 'site'), str(file)]
    subprocess.run(install, check=True, capture_output=True)
    return file, folder / 'site'


def installed(site, arguments, cwd):
    """Runs Python on the installed package, in a folder that is no clone."""
    env = {**os.environ, 'PYTHONPATH': str(site)}
    outcome = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=env)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return outcome.stdout


def test_wheel_installs_and_the_core_imports_torch_alone(wheel, tmp_path):
    file, site = wheel
    packages = {path.name for path in (ROOT / 'plugins').iterdir() if (path / '__init__.py').exists()}
    assert packages == {name.split('/')[0] for name in zipfile.ZipFile(file).namelist() if '.dist-info' not in name}
    toolkits = TOOLKITS | {'mmengine', 'mmcv', 'sklearn', 'matplotlib'}
    code = f'import sys, selfkd, selfkd.cli; print(selfkd.__file__, {toolkits} & set(sys.modules))'
    assert installed(site, ['-c', code], tmp_path).split() == [str(site / 'selfkd/__init__.py'), 'set()']


def test_installed_command_trains_what_inherits_from_the_installed_configs(wheel, digits, tmp_path):
    _, site = wheel
    selfkd = site / 'bin/selfkd'
    listed = installed(site, [selfkd, 'config'], tmp_path).split()
    ours = {
        f'selfkd_{toolkit}::{path.relative_to(ROOT / "configs" / toolkit).as_posix()}'
        for toolkit in ('mmpretrain', 'mmdet', 'mmseg')
        for path in (ROOT / 'configs' / toolkit).glob('**/*.py')
    }
    assert set(listed) == ours
    (tmp_path / 'mine.py').write_text(
        "_base_ = ['selfkd_mmpretrain::_base_/digits.py', 'selfkd_mmpretrain::_base_/pskd.py']\n"
        f'train_dataloader = dict(dataset=dict(data_root={str(digits)!r}))\n'
        'model = dict(backbone=dict(base_channels=4, stem_channels=4), head=dict(in_channels=32))\n'
        'train_cfg = dict(max_epochs=2)\nval_cfg = val_dataloader = val_evaluator = None\n'
    )
    installed(site, [selfkd, 'train', 'mine.py'], tmp_path)
    checkpoint = torch.load(tmp_path / 'work_dirs/mine/epoch_2.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 2
    assert checkpoint['selfkd']['PSKDHook']['bank']['seen'].all()


def test_a_plugin_imports_no_other_toolkit():
    """mmpretrain itself imports mmdet where it finds it: only what the plugin adds counts."""
    code = f'import sys, %s; print(sorted({TOOLKITS} & set(sys.modules)))'
    before, after = (
        subprocess.run([sys.executable, '-c', code % names], check=True, capture_output=True, text=True).stdout
        for names in ('mmpretrain.models', 'mmpretrain.models, selfkd_mmpretrain')
    )
    assert before == after


def test_what_other_packages_use_is_public():
    used, public = set(), set()
    for path in sorted((ROOT / 'plugins').rglob('*.py')):
        module = '.'.join(path.relative_to(ROOT / 'plugins').with_suffix('').parts).replace('.__init__', '')
        public.add(module)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('selfkd') and not node.level:
                if node.module.split('.')[0] != module.split('.')[0]:
                    used |= {f'{node.module}.{alias.name}' for alias in node.names}
            elif isinstance(node, (ast.Assign, ast.AugAssign)) and '__all__' in ast.unparse(node):
                public |= {f'{module}.{name.value}' for name in ast.walk(node.value) if isinstance(name, ast.Constant)}
    assert used
    assert used <= public, sorted(used - public)


@pytest.mark.parametrize(('python', 'constraints'), [('3.11', 'constraints.txt'), ('3.10', 'constraints-py310.txt')])
def test_the_pinned_versions_are_allowed(python, constraints):
    """What pip would install for the extra of fairseq on that Python, against the versions that were run together."""
    tomllib = pytest.importorskip('tomllib')  # Python 3.11
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    lines = (ROOT / 'requirements' / constraints).read_text().splitlines()
    pinned = dict(line.split('==') for line in lines if '==' in line and not line.startswith('#'))
    wanted = map(Requirement, project['dependencies'] + project['optional-dependencies']['fairseq'])
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({'python_version': python})]
    assert {'torch', 'fairseq-fixed' if python == '3.11' else 'fairseq'} <= {r.name for r in wanted}
    assert [str(r) for r in wanted if not r.specifier.contains(pinned[r.name])] == []


def test_pre_commit_checks_with_the_linters_ruff():
    (ruff,) = (line for line in (ROOT / 'requirements/lint.txt').read_text().splitlines() if line.startswith('ruff=='))
    assert f'additional_dependencies: [{ruff}]' in (ROOT / '.pre-commit-config.yaml').read_text()
