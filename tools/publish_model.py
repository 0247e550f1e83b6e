"""``selfkd publish``, from a clone."""

import sys

from selfkd.cli import main

if __name__ == '__main__':
    main(['publish', *sys.argv[1:]])
