"""What the tests of loops of one's own share."""

from helpers.loops import digits  # noqa: F401  (a fixture)
