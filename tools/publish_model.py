"""Writes what inference needs of a training checkpoint: the weights, without FRSKD's self-teacher.

    python tools/publish_model.py work_dirs/frskd/epoch_200.pth frskd_resnet18.pth

The result loads strictly into the plain model's config and gives the same predictions.
"""

import argparse

from selfkd.publish import publish_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('checkpoint', help='a checkpoint of mmengine or Detectron2 (only files you trust: it is unpickled)')
parser.add_argument('out', help='the file to write')
args = parser.parse_args()
dropped = publish_checkpoint(args.checkpoint, args.out)
print(f'{args.out}: dropped {dropped} tensors of the self-teacher, and the optimizer')
