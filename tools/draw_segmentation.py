"""Draws what segmentation models make of images of their test set.

    python tools/draw_segmentation.py predictions OUT.png NAME=CONFIG,CHECKPOINT [NAME=...] --images 0 1 2
    python tools/draw_segmentation.py attention OUT.png CONFIG,CHECKPOINT --images 0

predictions: the image, its labels, each model's prediction. attention: where the feature maps of a model trained with
FRSKD, and those of its self-teacher, are large.
"""

import argparse
from typing import Dict, Sequence, Tuple

import numpy as np
import torch
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.registry import DefaultScope
from mmseg.apis import init_model
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample
from torch import nn

from selfkd.files import replacing


def draw_predictions(models: Dict[str, Tuple[str, str]], images: Sequence[int], path: str) -> None:
    """A row per image of the test set: the image, its labels (ignored pixels white), each model's prediction.

    Args:
        models: name -> config and checkpoint.
        images: positions in the test set.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    columns, shown = {}, set()
    for name, (config, checkpoint) in models.items():
        model, dataset = load(config, checkpoint)
        samples = [predict(model, dataset, i) for i in images]
        columns.setdefault('image', [image for image, _ in samples])
        columns.setdefault('labels', [colors(dataset, s.gt_sem_seg.data[0]) for _, s in samples])
        columns[name] = [colors(dataset, s.pred_sem_seg.data[0]) for _, s in samples]
        shown |= {int(c) for _, s in samples for part in (s.gt_sem_seg, s.pred_sem_seg) for c in part.data.unique()}
    figure, axes = grid(pyplot, len(images), columns)
    for column, (name, pictures) in zip(axes.T, columns.items()):
        column[0].set_title(name)
        for axis, picture in zip(column, pictures):
            axis.imshow(picture)
    classes, palette = dataset.metainfo['classes'], np.array(dataset.metainfo['palette']) / 255
    patches = [Patch(color=palette[c], label=classes[c]) for c in sorted(shown) if c < len(classes)]
    figure.legend(handles=patches, loc='outside lower center', ncols=min(len(patches), 6), frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110)


def draw_attention(config: str, checkpoint: str, images: Sequence[int], path: str) -> None:
    """Two rows per image of the test set: the attention maps of the student's feature maps, and of the self-teacher's.

    An attention map is what attention transfer compares: the channel mean of the squares. Each is painted from its own
    least to its own greatest value, so brightness cannot be compared between panels; the picture says so.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    model, dataset = load(config, checkpoint)
    if not hasattr(model, 'self_teacher'):
        raise ValueError(f'{config}: the model has no self-teacher (model.type is not FRSKDEncoderDecoder)')
    rows = []
    for i in images:
        data = model.data_preprocessor(pseudo_collate([dataset[i]]), False)
        with torch.no_grad():
            feats = model.extract_feat(data['inputs'])
            refined, _ = model.self_teacher(feats)
        image, _ = predict(model, dataset, i)
        for who, maps in (('student', model.self_teacher.select(feats)), ('self-teacher', refined)):
            rows.append((who, image, [m[0].pow(2).mean(0).numpy() for m in maps]))
    levels = [f'{m.shape[0]} x {m.shape[1]}' for m in rows[0][2]]
    figure, axes = grid(pyplot, len(rows), ['image', *levels])
    for title, axis in zip(('image', *levels), axes[0]):
        axis.set_title(title)
    for line, (who, image, maps) in zip(axes, rows):
        line[0].set_ylabel(who)
        line[0].imshow(image)
        for axis, values in zip(line[1:], maps):
            axis.imshow(values, cmap='magma', interpolation='nearest')
    figure.supxlabel('each panel has its own scale: dark is its least value, bright its greatest', fontsize='medium')
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110)


def load(config: str, checkpoint: str) -> Tuple[nn.Module, BaseDataset]:
    model = init_model(config, checkpoint, device='cpu')
    with DefaultScope.overwrite_default_scope('mmseg'):
        return model, DATASETS.build(model.cfg.test_dataloader.dataset)


def predict(model: nn.Module, dataset: BaseDataset, i: int) -> Tuple[np.ndarray, SegDataSample]:
    """The image, RGB, and the sample with labels and prediction."""
    from PIL import Image

    with torch.no_grad():
        (sample,) = model.test_step(pseudo_collate([dataset[i]]))
    return np.asarray(Image.open(sample.img_path).convert('RGB')), sample


def colors(dataset: BaseDataset, classes: torch.Tensor) -> np.ndarray:
    palette = np.full((256, 3), 255, np.uint8)
    palette[: len(dataset.metainfo['palette'])] = dataset.metainfo['palette']
    return palette[classes.cpu().numpy()]


def grid(pyplot, rows: int, columns: Sequence[str]):
    figure, axes = pyplot.subplots(
        rows, len(columns), squeeze=False, layout='constrained', figsize=(1.5 * len(columns) + 0.4, 1.5 * rows + 0.6)
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


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

    if args.kind == 'predictions':
        draw_predictions(models, args.images, args.out)
    else:
        draw_attention(*models[''], args.images, args.out)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
