"""Digits on photographs in VOC's layout."""

import pytest


@pytest.fixture(scope='session')
def voc(tmp_path_factory):
    import make_toy_data

    folder = tmp_path_factory.mktemp('VOCdevkit')
    make_toy_data.voc(folder, train_size=4, test_size=2)
    return folder
