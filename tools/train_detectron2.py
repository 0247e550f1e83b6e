"""``selfkd train-detectron2``, from a clone."""

import sys

from selfkd.cli import main

if __name__ == '__main__':
    main(['train-detectron2', *sys.argv[1:]])
