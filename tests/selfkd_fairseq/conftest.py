"""What the tests of fairseq's plugin share."""

import pytest
from helpers.fairseq import largest_difference


@pytest.fixture(scope='session')
def difference():
    return largest_difference
