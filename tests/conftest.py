"""Shared by all tests: the scripts in tools/ are importable, and real digit scans lie in a folder."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # the tests' models are too small for more; set before torch is imported

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / 'tools'), str(ROOT / 'tests')]
collect_ignore = ['helpers']  # has no tests; some of it needs a toolkit that is not everywhere

from helpers.fairseq import fairseq  # noqa: E402, F401  (a fixture)


def pytest_collection_finish():
    """All toolkits are imported now. mmengine calls gc.collect() for every data set, which would look through them,
    and formats each run's config four times for its logs, which takes a second."""
    gc.collect()
    gc.freeze()
    if 'mmengine.config.config' in sys.modules:
        sys.modules['mmengine.config.config'].FormatCode = lambda text, **options: (text, False)


@pytest.fixture(autouse=True)
def scope(request):
    """The OpenMMLab toolkit of the test's folder, as a Runner would set it: models are also built without one."""
    toolkit = request.path.parent.name.replace('selfkd_', '').replace('mmengine', 'mmpretrain')
    if not toolkit.startswith('mm'):
        yield
        return
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope(toolkit):
        yield


@pytest.fixture(autouse=True)
def own_visualizers():
    """As a process of its own has none: mmengine keeps visualizers by their names, which most configs share, so that a
    test would write into the folder of an earlier one, which pytest has removed."""
    kinds = [sys.modules['mmengine.visualization'].Visualizer] if 'mmengine.visualization' in sys.modules else []
    for kind in kinds:
        kind._instance_dict.clear()
        kinds += kind.__subclasses__()


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """An image folder of 40 training and 150 test digits, with 20 % wrong training labels."""
    import make_toy_data

    folder = tmp_path_factory.mktemp('data') / 'digits'
    make_toy_data.digits(folder, label_noise=0.2, train_size=40)
    for label in (folder / 'test').iterdir():
        for image in sorted(label.iterdir())[15:]:  # mmengine evaluates at the end of each run
            image.unlink()
    return folder


@pytest.fixture(scope='session')
def voc(tmp_path_factory):
    """Four training images and two test images in the layout of PASCAL VOC, digits on photographs."""
    import make_toy_data

    folder = tmp_path_factory.mktemp('VOCdevkit')
    make_toy_data.voc(folder, train_size=4, test_size=2)
    return folder
