"""A built wheel installs and imports, and the core brings in no toolkit."""

import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement

from conftest import ROOT

TOOLKITS = {'mmpretrain', 'mmdet', 'mmseg', 'fairseq', 'detectron2', 'lightning', 'transformers'}


def test_wheel_installs_and_the_core_imports_torch_alone(tmp_path):
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    build = [*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('selfkd-*.whl')
    packages = {path.name for path in (ROOT / 'plugins').iterdir() if (path / '__init__.py').exists()}
    assert packages == {name.split('/')[0] for name in zipfile.ZipFile(wheel).namelist() if '.dist-info' not in name}
    target = tmp_path / 'site'
    subprocess.run([*pip, 'install', '--no-deps', '--target', str(target), str(wheel)], check=True, capture_output=True)
    code = (
        f'import sys; sys.path.insert(0, {str(target)!r}); import selfkd; assert {str(target)!r} in selfkd.__file__; '
        f'assert not {TOOLKITS | {"mmengine", "mmcv", "sklearn", "matplotlib"}} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path)


def test_a_plugin_imports_no_other_toolkit():
    """mmpretrain itself imports mmdet where it finds it: only what the plugin adds counts."""
    code = f'import sys, %s; print(sorted({TOOLKITS} & set(sys.modules)))'
    before, after = (
        subprocess.run([sys.executable, '-c', code % names], check=True, capture_output=True, text=True).stdout
        for names in ('mmpretrain.models', 'mmpretrain.models, selfkd_mmpretrain')
    )
    assert before == after


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
