"""A backbone trained in MMPretrain as the start of a detector in MMDetection or Detectron2: the paper's protocol."""

import inspect
import pickle
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from selfkd.cli import command_parser, refusing
from selfkd.files import load, replacing
from selfkd_mmengine.configs import load_config

__all__ = ['Converted', 'convert_backbone', 'detectron2_name']

TOLERANCE = 1e-4
# Options of MMPretrain's ResNet that change no weight and no feature of the trained network, and those converted too.
HARMLESS = {'type', 'out_indices', 'frozen_stages', 'norm_eval', 'norm_cfg', 'with_cp', 'zero_init_residual'}
HARMLESS |= {'drop_path_rate', 'init_cfg', 'depth', 'style', 'stem_channels', 'base_channels'}
DETECTRON2_NAMES = (
    (r'^(conv1|bn1)\.', r'stem.\1.'),
    (r'^layer(\d)\.', lambda match: f'res{int(match[1]) + 1}.'),
    (r'\.downsample\.0\.', '.shortcut.'),
    (r'\.downsample\.1\.', '.shortcut.norm.'),
    (r'\.bn(\d)\.', r'.conv\1.norm.'),
)


class Converted(NamedTuple):
    """What ``convert_backbone`` found.

    Attributes:
        depth: of the ResNet.
        difference: largest difference between the features of the two toolkits on the image, relative to the largest
            feature of their stage; None where Detectron2 is not installed.
        usage: the lines that make a detector start from the file.
    """

    depth: int
    difference: Optional[float]
    usage: str


def convert_backbone(
    source: str, target: str, *, to: str, config: str, image: Optional[np.ndarray] = None
) -> Converted:
    """Writes the backbone of an MMPretrain checkpoint such that a detector starts from it, and compares the features.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021, section 4.3, put a
    ResNet-152 pre-trained with PS-KD under Faster R-CNN in this way
    https://arxiv.org/abs/2006.12000

    Args:
        source: a checkpoint of MMPretrain. Load only files you trust: it is unpickled.
        target: the file to write; it is moved into place once its features have been compared.
        to: ``'mmdet'`` (for ``init_cfg``) or ``'detectron2'`` (for ``MODEL.WEIGHTS``; a ``.pkl``).
        config: the MMPretrain config that the checkpoint was trained with.
        image: RGB, uint8 ``[H, W, 3]``, on which features are compared.

    Raises:
        ValueError: another backbone than a ResNet of torchvision's layout (all channels may be fewer or more), or a
            checkpoint that is not of it; to Detectron2 a ResNet-18 or -34 of another width.
        RuntimeError: features that differ by more than 1e-4. ``target`` is as it was before.
        OSError: a file cannot be read or written.
    """
    if to not in ('mmdet', 'detectron2'):
        raise ValueError(f"to: must be 'mmdet' or 'detectron2', got {to!r}")
    if to == 'detectron2' and not target.endswith('.pkl'):
        raise ValueError(f'target: Detectron2 reads such weights from a file that ends in .pkl, got {target}')
    cfg = load_config(config)
    backbone = _source_backbone(cfg.model.backbone, source)
    weights, depth = backbone.state_dict(), backbone.depth
    mean, std = _normalization(cfg)
    if to == 'detectron2' and depth < 50 and backbone.base_channels != 64:
        raise ValueError(
            f'to: Detectron2 has ResNet-{depth} with base_channels=64 only, got {backbone.base_channels}: take a '
            'ResNet-50 or deeper for a narrow backbone'
        )
    difference = None
    other: Optional[nn.Module]
    with replacing(target) as beside:  # it takes its place once its features have been compared
        if to == 'mmdet':
            options = dict(depth=depth, style=backbone.style, **_width(backbone))
            torch.save({'state_dict': weights}, beside)
            other = _mmdet_backbone(options, str(beside))
            settings = ', '.join(f'{name}={value!r}' for name, value in options.items())
            usage = MMDET.format(options=settings, target=target)
        else:
            options = _detectron2_options(backbone)
            _write_detectron2(weights, beside)
            other = _detectron2_backbone(options, str(beside))
            settings = '\n    '.join(f'{name}: {value}' for name, value in options.items())
            usage = DETECTRON2.format(settings=settings, target=target, mean=mean, std=std)
        if other is not None:
            difference = _difference(backbone, other, _input(image, mean, std))
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f'{target}: its features differ from those of {source} by {difference:.1e}: not written'
                )
    return Converted(depth, difference, usage)


def detectron2_name(name: str) -> str:
    """The name of a ResNet's parameter or buffer in Detectron2.

    Example:
        >>> detectron2_name('layer1.0.downsample.1.weight'), detectron2_name('bn1.running_mean')
        ('res2.0.shortcut.norm.weight', 'stem.conv1.norm.running_mean')
    """
    for pattern, replacement in DETECTRON2_NAMES:
        name = re.sub(pattern, replacement, name)
    return name.replace('stem.bn1.', 'stem.conv1.norm.')


MMDET = """model = dict(
    backbone=dict(
        type='ResNet', {options}, init_cfg=dict(type='Pretrained', checkpoint='{target}')))"""

DETECTRON2 = """MODEL:
  WEIGHTS: {target}
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
  RESNETS:
    {settings}
INPUT:
  FORMAT: RGB"""


def _write_detectron2(weights: Dict[str, Tensor], path: Path) -> None:
    arrays = {detectron2_name(k): v.numpy() for k, v in weights.items() if not k.endswith('num_batches_tracked')}
    with open(path, 'wb') as file:
        pickle.dump({'model': arrays, '__author__': 'selfkd', 'matching_heuristics': True}, file)


def _source_backbone(options: ConfigDict, source: str) -> nn.Module:
    from mmpretrain.models.backbones import ResNet

    usual = inspect.signature(ResNet).parameters
    other = sorted(
        name
        for name, value in options.items()
        if name not in HARMLESS and not (name in usual and _same(value, usual[name].default))
    )
    if options.type.split('.')[-1] != 'ResNet' or other:
        raise ValueError(
            f'config: the backbone {options.type}{" with " * bool(other)}{", ".join(other)} is not supported: '
            'only ResNet (depth 18 to 152) of the usual layout has the same form in all three toolkits'
        )
    state = load(source)
    state = state.get('state_dict', state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError(f'source: {source} holds a {type(state).__name__} instead of a checkpoint or a state dict')
    state = {name[len('backbone.') :]: value for name, value in state.items() if name.startswith('backbone.')}
    width = {name: options[name] for name in ('stem_channels', 'base_channels') if name in options}
    backbone = ResNet(options.depth, style=options.get('style', 'pytorch'), out_indices=(0, 1, 2, 3), **width)
    try:
        load_state_dict(backbone, state, strict=True)
    except RuntimeError as error:
        raise ValueError(f'source: {source} does not hold the backbone of the config: {error}') from error
    return backbone


def _same(value: Any, other: Any) -> bool:
    return (list(value) == list(other)) if isinstance(value, (list, tuple)) and other else value == other


def _width(backbone: nn.Module) -> Dict[str, int]:
    """The options that say how wide it is, where it is not as usual."""
    width = dict(stem_channels=backbone.stem_channels, base_channels=backbone.base_channels)
    return {} if set(width.values()) == {64} else width


def _mmdet_backbone(options: Dict[str, object], target: str) -> nn.Module:
    try:
        from mmdet.models.backbones import ResNet
    except ModuleNotFoundError as error:
        raise ValueError(
            f'to: mmdet needs {error.name} to compare the features, which is not installed here: '
            'install MMDetection (docs/mmdet.md)'
        ) from error

    backbone = ResNet(**options, init_cfg=dict(type='Pretrained', checkpoint=target))
    backbone.init_weights()
    return backbone


def _detectron2_options(backbone: nn.Module) -> Dict[str, object]:
    options = {'DEPTH': backbone.depth, 'STRIDE_IN_1X1': backbone.style == 'caffe'}
    base = backbone.base_channels
    if backbone.depth < 50:
        options['RES2_OUT_CHANNELS'] = base
    elif base != 64:
        options.update(RES2_OUT_CHANNELS=4 * base, WIDTH_PER_GROUP=base)
    if backbone.stem_channels != 64:
        options['STEM_OUT_CHANNELS'] = backbone.stem_channels
    return options


def _detectron2_backbone(options: Dict[str, object], target: str) -> Optional[nn.Module]:
    try:
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import get_cfg
        from detectron2.modeling import build_resnet_backbone
    except ImportError:
        return None
    from detectron2.layers import ShapeSpec

    cfg = get_cfg()
    cfg.MODEL.RESNETS.update(options, OUT_FEATURES=['res2', 'res3', 'res4', 'res5'])
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    DetectionCheckpointer(backbone).load(target)
    return backbone


def _normalization(cfg: Config) -> Tuple[List[float], List[float]]:
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    return list(preprocessor.get('mean', [0.0] * 3)), list(preprocessor.get('std', [1.0] * 3))


def _input(image: Optional[np.ndarray], mean: List[float], std: List[float]) -> Tensor:
    if image is None:
        from sklearn.datasets import load_sample_image

        image = load_sample_image('china.jpg')[:224, :320]
    pixels = torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1).float()
    return ((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]


def _difference(backbone: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    backbone.eval(), other.eval()
    with torch.no_grad():
        ours, theirs = backbone(inputs), other(inputs)
    theirs = theirs.values() if isinstance(theirs, dict) else theirs
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(ours, theirs))


def main(arguments: Sequence[str]) -> None:
    """Turns a ResNet trained in MMPretrain into the start of a detector, and checks that its features stay the same.

        selfkd convert-backbone work_dirs/RUN/epoch_90.pth resnet152_pskd.pth --to mmdet --config CONFIG
        selfkd convert-backbone work_dirs/RUN/epoch_90.pth resnet152_pskd.pkl --to detectron2 --config CONFIG

    CONFIG is the MMPretrain config of the run. It prints the lines for the detector's config.
    """
    parser = command_parser('convert-backbone', main.__doc__)
    parser.add_argument('source', help='a checkpoint of MMPretrain (only files you trust: it is unpickled)')
    parser.add_argument('target', help='the file to write')
    parser.add_argument('--to', required=True, choices=['mmdet', 'detectron2'])
    parser.add_argument('--config', required=True, help='the MMPretrain config that the checkpoint was trained with')
    args = parser.parse_args(arguments)
    with refusing(parser, RuntimeError):
        found = convert_backbone(args.source, args.target, to=args.to, config=args.config)
    print(found.usage)
    if found.difference is None:
        print(f'\nwrote {args.target}: features not compared, Detectron2 is not installed here')
    else:
        print(f'\nwrote {args.target}: largest relative difference of features {found.difference:.1e}')
