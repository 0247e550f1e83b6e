"""``selfkd report``, from a clone."""

import sys

from selfkd.cli import main

if __name__ == '__main__':
    main(['report', *sys.argv[1:]])
