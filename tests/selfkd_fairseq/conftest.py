"""What the tests of fairseq's plugin share."""

import pytest
from helpers.fairseq import fairseq, largest_difference  # noqa: F401  (a fixture)


@pytest.fixture(scope='session')
def difference():
    return largest_difference
