"""Draws what segmentation models make of images of their test set.

    python tools/draw_segmentation.py predictions OUT.png NAME=CONFIG,CHECKPOINT [NAME=...] --images 0 1 2
    python tools/draw_segmentation.py attention OUT.png CONFIG,CHECKPOINT --images 0

predictions: the image, its labels, each model's prediction. attention: where the feature maps of a model trained with
FRSKD, and those of its self-teacher, are large.
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kind', choices=['predictions', 'attention'])
    parser.add_argument('out', help='the picture to write')
    parser.add_argument('models', nargs='+', metavar='MODEL', help='[NAME=]CONFIG,CHECKPOINT')
    parser.add_argument('--images', nargs='+', type=int, default=[0, 1, 2, 3], help='positions in the test set')
    args = parser.parse_args()
    models = {}
    for text in args.models:
        name, _, paths = text.rpartition('=')
        if paths.count(',') != 1 or (args.kind == 'predictions') == (not name):
            parser.error(f'{text}: must be {"NAME=" if args.kind == "predictions" else ""}CONFIG,CHECKPOINT')
        models[name] = paths.split(',')

    from selfkd_mmseg.draw import draw_attention, draw_predictions

    if args.kind == 'predictions':
        draw_predictions(models, args.images, args.out)
    else:
        draw_attention(*models[''], args.images, args.out)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
