"""A built wheel installs and imports, and the core brings in no toolkit."""

import subprocess
import sys
import zipfile

from conftest import ROOT

TOOLKITS = {'mmpretrain', 'mmdet', 'mmseg', 'fairseq', 'detectron2'}


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
