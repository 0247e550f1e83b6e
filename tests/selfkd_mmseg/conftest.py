"""What the segmentation tests share: images in the layout of PASCAL VOC."""

import make_toy_data
import pytest


@pytest.fixture(scope='session')
def voc(tmp_path_factory):
    """Eight training images and two test images, digits on photographs."""
    folder = tmp_path_factory.mktemp('VOCdevkit')
    make_toy_data.voc(folder, train_size=8, test_size=2)
    return folder / 'VOC2007'
