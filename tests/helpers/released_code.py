"""Loads the authors' modules from a user's clones, and pairs their networks' tensors with ours."""

import ast
import importlib
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Dict

import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from helpers import ROOT

FOLDER = Path(os.environ.get('SELFKD_RELEASED', '')).resolve()
REPOSITORIES = {
    'PS-KD-Pytorch': 'https://github.com/lgcnsai/PS-KD-Pytorch',
    'cs-kd': 'https://github.com/alinlab/cs-kd',
    'FRSKD': 'https://github.com/MingiJi/FRSKD',
}


def needs(*names: str):
    """Skips the module's tests where a repository is missing."""
    given = 'SELFKD_RELEASED' in os.environ
    missing = [name for name in names if not given or not (FOLDER / name).is_dir()]
    return pytest.mark.skipif(
        bool(missing),
        reason="SELFKD_RELEASED must name the folder of the authors' clones (see tests/released/conftest.py): "
        f'{", ".join(missing)} missing',
    )


def commit(name: str) -> str:
    outcome = subprocess.run(
        ['git', '-C', str(FOLDER / name), 'log', '-1', '--format=%h, %as'], capture_output=True, text=True
    )
    return outcome.stdout.strip() or 'missing'


@contextmanager
def _only(repository: str):
    """Its packages, whose names (models, utils) another repository has as well, are what an import finds."""
    folder = FOLDER / repository
    names = {path.stem for path in folder.iterdir()}
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split('.')[0] in names}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split('.')[0] in names]:
            del sys.modules[name]
        sys.modules.update(aside)


def module(repository: str, name: str):
    with _only(repository):
        return importlib.import_module(name)


def definitions(repository: str, file: str, names, **given) -> dict:
    """Functions and classes of a script, which runs the whole training when it is imported."""
    source = FOLDER / repository / file
    tree = ast.parse(source.read_text())
    tree.body = [node for node in tree.body if getattr(node, 'name', None) in names]
    assert {node.name for node in tree.body} == set(names)
    exec(compile(tree, str(source), 'exec'), given)
    return given


def float_tensor(*args) -> Tensor:
    """Stands for torch.cuda.FloatTensor: of the default dtype, where there is no GPU."""
    return (
        torch.empty(args)
        if all(isinstance(arg, int) for arg in args)
        else torch.tensor(*args, dtype=torch.get_default_dtype())
    )


def bernoulli_(self: Tensor, p: float) -> Tensor:
    """Draws as our ShakeDrop does: disturbed where a number from U(0, 1) is below 1 - p."""
    return self.fill_(float(torch.rand(()).item() >= 1 - p))


def ours(config: str, *, initialise: bool = False, **options) -> nn.Module:
    """The model of one of the configs, ``configs/mmpretrain/CONFIG.py``; in float64 unless its start is looked at."""
    cfg = Config.fromfile(ROOT / f'configs/mmpretrain/{config}.py')
    cfg.merge_from_dict(options)
    model = MODELS.build(cfg.model)
    if initialise:
        model.init_weights()
    return model


Mapping = Callable[[str, Tensor], Tensor]


def renamed(*rules):
    """From the authors' names to ours: regular expressions, all applied in order."""

    def apply(named: Dict[str, Tensor]) -> Dict[str, Tensor]:
        out = {}
        for name, value in named.items():
            for pattern, to in rules:
                name = re.sub(pattern, to, name)
            out[name] = value
        return out

    return apply


def stage(match) -> str:
    return f'backbone.stages.{int(match[1]) - 1}'


def newest_last(named: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """DenseNets of the two CIFAR codes put a layer's new maps before the old ones, MMPretrain's puts them after: what
    reads them has its input channels in another order."""
    growth = named['dense1.0.conv2.weight'].shape[0] if 'dense1.0.conv2.weight' in named else 32
    out = {}
    for name, value in named.items():
        match = re.match(r'(?:dense(\d)\.(\d+)\.(bn1|conv1)|trans(\d)\.|(bn|linear)\.)', name)
        if match:
            block = int(match[1] or match[4] or 4)
            axis = 1 if value.dim() > 1 else 0
            layers = int(match[2]) if match[2] else DEPTHS[block - 1]
            old_bias = name == 'linear.bias' or value.dim() == 0
            if not old_bias:
                pieces = list(value.split([growth] * layers + [value.shape[axis] - growth * layers], dim=axis))
                value = torch.cat(pieces[::-1], dim=axis)
        out[name] = value
    return out


DEPTHS = (6, 12, 24, 16)


def merged_laterals(named: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Our pyramid computes the two lateral convolutions of a level as one of twice the output."""
    out = {}
    for name, value in named.items():
        match = re.match(r'layers\.0\.(lat_conv2?)\.(\d)\.conv\.0\.(.*)', name)
        if not match:
            out[name] = value
        elif match[1] == 'lat_conv':
            other = f'layers.0.lat_conv2.{int(match[2]) - 1}.conv.0.{match[3]}'
            both = value if other not in named or value.dim() == 0 else torch.cat([value, named[other]])
            out[f'layers.0.laterals.{match[2]}.{match[3]}'] = both
    return out


def chain(*mappings):
    def apply(named):
        for mapping in mappings:
            named = mapping(named)
        return named

    return apply


BLOCK = r'layer(\d)\.(\d+)'
LINEAR = (r'^(fc|linear|classifier)\.', 'head.fc.')
TO_OURS = {
    'preact': renamed((r'^layer(\d)', stage), (r'shortcut\.0', 'shortcut'), (r'^(conv1|bn1)', r'backbone.\1'), LINEAR),
    'resnet': renamed((r'shortcut\.', 'downsample.'), (r'^(conv1|bn1|layer)', r'backbone.\1'), LINEAR),
    'densenet-cifar': chain(
        newest_last,
        renamed(
            (r'^conv1\.', 'backbone.stem.'),
            (r'^dense(\d)\.(\d+)\.', lambda m: f'backbone.stages.{int(m[1]) - 1}.block.{m[2]}.'),
            (r'^trans(\d)\.', lambda m: f'backbone.transitions.{int(m[1]) - 1}.'),
            (r'^bn\.', 'backbone.transitions.3.0.'),
            (r'\.bn(\d?)\.', r'.norm\1.'),
            LINEAR,
        ),
    ),
    'densenet': renamed(
        (r'^features\.conv0', 'backbone.stem.0'),
        (r'^features\.norm0', 'backbone.stem.1'),
        (
            r'^features\.denseblock(\d)\.denselayer(\d+)',
            lambda m: f'backbone.stages.{int(m[1]) - 1}.block.{int(m[2]) - 1}',
        ),
        (r'^features\.transition(\d)', lambda m: f'backbone.transitions.{int(m[1]) - 1}'),
        (r'^features\.norm5', 'backbone.transitions.3.0'),
        LINEAR,
    ),
    'resnext': renamed(
        (r'^conv_1_3x3', 'backbone.conv1'),
        (r'^bn_1\.', 'backbone.bn1.'),
        (r'^stage_(\d)\.stage_\d_bottleneck_(\d)\.', r'backbone.layer\1.\2.'),
        ('conv_reduce', 'conv1'),
        ('bn_reduce', 'bn1'),
        ('conv_conv', 'conv2'),
        (r'(\d)\.bn\.', r'\1.bn2.'),
        ('conv_expand', 'conv3'),
        ('bn_expand', 'bn3'),
        (r'shortcut\.shortcut_conv', 'downsample.0'),
        (r'shortcut\.shortcut_bn', 'downsample.1'),
        LINEAR,
    ),
    'pyramidnet': renamed(
        (r'^conv1', 'backbone.stem.0'),
        (r'^bn1', 'backbone.stem.1'),
        (r'^bn_final', 'backbone.bn'),
        (
            r'^layer(\d)\.(\d+)\.(bn|conv)(\d)',
            lambda m: (
                f'backbone.stages.{int(m[1]) - 1}.{m[2]}.layers.'
                + str({'bn1': 0, 'conv1': 1, 'bn2': 2, 'conv2': 4, 'bn3': 5, 'conv3': 7, 'bn4': 8}[m[3] + m[4]])
            ),
        ),
        LINEAR,
    ),
    'wrn': chain(
        # A batch norm that the released forward pass never calls.
        lambda named: {name: value for name, value in named.items() if not name.startswith('bn1.')},
        renamed(
            (r'^block(\d)bn', lambda m: f'backbone.stages.{int(m[1]) - 1}.2'),
            (r'^block(\d)\.layer', lambda m: f'backbone.stages.{int(m[1]) - 1}'),
            (r'\.bn2\.', '.bn.'),
            ('convShortcut', 'shortcut'),
            (r'^conv1', 'backbone.conv1'),
            LINEAR,
        ),
    ),
    'pyramid': chain(
        merged_laterals,
        renamed(
            (r'up_sample\.(\d)\.1\.conv\.0', r'from_coarser.\1'),
            (r'down_sample\.(\d)\.1\.conv\.0', r'from_finer.\1'),
            (r'up_conv\.(\d)\.conv\.0', r'top_down.\1'),
            (r'up_conv\.(\d)\.conv\.1\.(\d)', lambda m: f'top_down.{m[1]}.{int(m[2]) + 3}'),
            (r'down_conv\.(\d)\.conv\.0', r'bottom_up.\1'),
            (r'down_conv\.(\d)\.conv\.1\.(\d)', lambda m: f'bottom_up.{m[1]}.{int(m[2]) + 3}'),
            (r'\.up_weight', '.top_down_weights'),
            (r'\.down_weight', '.bottom_up_weights'),
        ),
    ),
}


def state(net: nn.Module) -> Dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if not name.endswith('num_batches_tracked')}


def gradients(net: nn.Module) -> Dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def furthest(theirs: Dict[str, Tensor], mine: Dict[str, Tensor]) -> float:
    """The largest difference of paired tensors, relative to the largest entry of all of them."""
    assert theirs.keys() == mine.keys(), theirs.keys() ^ mine.keys()
    scale = max(value.abs().max().item() for value in theirs.values())
    return max((theirs[name] - mine[name]).abs().max().item() for name in theirs) / scale


def pskd(name, **options):
    def make():
        net = getattr(module('PS-KD-Pytorch', 'models'), name)(**options)
        for layer in net.modules():
            if type(layer).__name__ == 'ShakeDrop':  # whose output, added to in place, today's torch asks to be cloned
                layer.register_forward_hook(lambda module, args, out: out.clone())
        return net

    return make


def cskd(name, classes):
    def make():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('os.popen', None)
            return module('cs-kd', 'models').load_model(name, classes)

    return make


def frskd(name, classes):
    return lambda: getattr(module('FRSKD', 'classification.models'), name)(num_classes=classes)


class TheirFRSKD:
    """The authors' network, self-teacher and criteria, put together as their main.py does."""

    def __init__(self, network, classes, **options):
        given = dict(num_features=-1, repeat=1, depth=[2] * 3, temperature=4, bifpn='BiFPNc', width=2, num_channels=256)
        given.update(distill='att', alpha=2, beta=100, aux='none', aux_lamb=0, aug='none', aug_a=0, num_classes=classes)
        self.args = args = SimpleNamespace(**{**given, **options})
        models, losses = module('FRSKD', 'classification.models'), module('FRSKD', 'classification.distill_loss')
        self.net = getattr(models, network)(num_classes=classes)
        args.num_features = len(self.net.network_channels)
        args.network_channels = self.net.network_channels
        self.teacher = models.BiFPNc(args.network_channels, classes, args)
        self.ce = losses.sla(args) if args.aux == 'sla' else nn.CrossEntropyLoss()
        self.kd = getattr(losses, args.distill)(args, self.teacher)
        self.all = nn.ModuleList([self.net, self.teacher, self.ce, self.kd]).double()

    def train(self, batches, optimizer):
        return module('FRSKD', 'classification.utils').train(
            self.net, self.teacher, optimizer, [self.ce, self.kd], batches, self.args
        )

    def map(self, what, mapping):
        """Their tensors under our names: of the network, the self-teacher, the adapters, SLA's classifiers."""
        named = TO_OURS[mapping](what(self.net))
        named.update({f'self_teacher.pyramid.{name}': v for name, v in TO_OURS['pyramid'](what(self.teacher)).items()})
        for name, value in what(self.kd).items():
            if not name.startswith('margin'):
                named['self_teacher.adapters.' + name.replace('linear.', '')] = value
        for name, value in what(self.ce).items():
            named[name.replace('fc1', 'self_teacher.joint').replace('fc2', 'self_teacher.teacher_joint')] = value
        return named
