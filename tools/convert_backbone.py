"""Turns a ResNet trained in MMPretrain into the start of a detector, and checks that its features stay the same.

    python tools/convert_backbone.py work_dirs/RUN/epoch_90.pth resnet152_pskd.pth --to mmdet --config CONFIG
    python tools/convert_backbone.py work_dirs/RUN/epoch_90.pth resnet152_pskd.pkl --to detectron2 --config CONFIG

CONFIG is the MMPretrain config of the run. It prints the lines for the detector's config.
"""

import argparse

from selfkd_mmengine.backbone import convert_backbone

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('source', help='a checkpoint of MMPretrain (only files you trust: it is unpickled)')
parser.add_argument('target', help='the file to write')
parser.add_argument('--to', required=True, choices=['mmdet', 'detectron2'])
parser.add_argument('--config', required=True, help='the MMPretrain config that the checkpoint was trained with')
args = parser.parse_args()
found = convert_backbone(args.source, args.target, to=args.to, config=args.config)
print(found.usage)
if found.difference is None:
    print(f'\nwrote {args.target}: features not compared, Detectron2 is not installed here')
else:
    print(f'\nwrote {args.target}: largest relative difference of features {found.difference:.1e}')
