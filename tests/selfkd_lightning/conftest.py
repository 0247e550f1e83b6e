"""What the tests of loops share."""

from helpers.loops import digits  # noqa: F401  (a fixture)
