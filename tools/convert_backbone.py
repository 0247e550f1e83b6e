"""``selfkd convert-backbone``, from a clone."""

import sys

from selfkd.cli import main

if __name__ == '__main__':
    main(['convert-backbone', *sys.argv[1:]])
