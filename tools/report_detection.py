"""``selfkd report-detection``, from a clone."""

import sys

from selfkd.cli import main

if __name__ == '__main__':
    main(['report-detection', *sys.argv[1:]])
