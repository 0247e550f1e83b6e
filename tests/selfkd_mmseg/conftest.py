"""What the segmentation tests share: MMSegmentation's scope, and images in the layout of PASCAL VOC."""

import make_toy_data
import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def scope():
    """Models are also built without a Runner, which would set it."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


@pytest.fixture(scope='session')
def voc(tmp_path_factory):
    """Eight training images and two test images, digits on photographs."""
    folder = tmp_path_factory.mktemp('VOCdevkit')
    make_toy_data.voc(folder, train_size=8, test_size=2)
    return folder / 'VOC2007'
