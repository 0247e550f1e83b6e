"""The table's rows as a parameter, and the toolkits they need."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # behind: there is another conftest


@pytest.fixture
def runs(request, tmp_path, tmp_path_factory):
    """How the row's toolkit is driven, in a folder of the test's own."""
    row = request.getfixturevalue('row')
    return row.toolkit.driver(row, request, tmp_path)
