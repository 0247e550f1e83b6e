"""``selfkd train``, from a clone."""

import sys

from selfkd.cli import main

if __name__ == '__main__':
    main(['train', *sys.argv[1:]])
