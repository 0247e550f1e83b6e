"""FRSKD's self-teacher layer by layer, to compare the core's with."""

import torch
import torch.nn.functional as F
from torch import nn

from selfkd.pyramid import SelfTeacherPyramid


class PlainPyramid(nn.Module):
    """FRSKD's self-teacher layer by layer as the paper lists them, from torch's modules, for comparison."""

    def __init__(self, in_channels, num_classes, width=2, depth=2):
        super().__init__()
        c = [width * n for n in in_channels]
        levels = range(len(c))
        self.lateral = nn.ModuleList(self.conv1x1(n, c[i]) for i, n in enumerate(in_channels))
        self.lateral2 = nn.ModuleList(self.conv1x1(in_channels[i], c[i]) for i in levels[1:])
        self.up = nn.ModuleList(self.conv1x1(c[i + 1], c[i]) for i in levels[:-1])
        self.down = nn.ModuleList(self.conv1x1(c[i - 1], c[i]) for i in levels[1:])
        self.top_down = nn.ModuleList(self.conv3x3(c[i], depth) for i in levels[:-1])
        self.bottom_up = nn.ModuleList(self.conv3x3(c[i], depth) for i in levels[1:])
        self.top_down_weights = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in levels[:-1])
        self.bottom_up_weights = nn.ParameterList(
            nn.Parameter(torch.ones(3 if i < len(c) - 1 else 2)) for i in levels[1:]
        )
        self.fc = nn.Linear(c[-1], num_classes)

    @staticmethod
    def conv1x1(n_in, n_out):
        return nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

    @staticmethod
    def conv3x3(n, depth):
        layers = []
        for _ in range(depth):
            layers += [nn.Conv2d(n, n, 3, padding=1, groups=n, bias=False), nn.Conv2d(n, n, 1, bias=False)]
            layers += [nn.BatchNorm2d(n), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    @staticmethod
    def fuse(weights, maps):
        weights = F.relu(weights)
        weights = weights / (weights.sum() + 1e-6)
        return sum(w * m for w, m in zip(weights, maps))

    @staticmethod
    def pool(x):
        """Max-pooling 3x3, stride 2, zero padding such that the size is halved and rounded up."""
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = 2 * ((size + 1) // 2 - 1) + 3 - size
            pads += [total // 2, total - total // 2]
        return F.max_pool2d(F.pad(x, pads), 3, 2)

    def forward(self, feats, *, preact=False):
        n = len(feats)
        first = [lateral(F.relu(f)) for lateral, f in zip(self.lateral, feats)]
        second = [None] + [lateral(F.relu(f)) for lateral, f in zip(self.lateral2, feats[1:])]
        p = [None] * (n - 1) + [first[-1]]
        for i in reversed(range(n - 1)):
            coarse = self.up[i](F.interpolate(F.relu(p[i + 1]), size=first[i].shape[2:], mode='nearest'))
            p[i] = self.top_down[i](self.fuse(self.top_down_weights[i], (F.relu(first[i]), coarse)))
        out = [p[0]]
        for i in range(1, n):
            fine = self.down[i - 1](self.pool(F.relu(out[-1])))
            maps = (F.relu(second[i]), F.relu(p[i]), fine) if i < n - 1 else (F.relu(second[i]), fine)
            out.append(self.bottom_up[i - 1](self.fuse(self.bottom_up_weights[i - 1], maps)))
        return out if preact else [F.relu(o) for o in out], self.fc(F.relu(out[-1]).mean((2, 3)))

    def state_of(self, fast: SelfTeacherPyramid) -> dict:
        """This module's state dict with the weights of a :class:`SelfTeacherPyramid` of one pass."""
        state, source = {}, {k.replace('layers.0.', ''): v for k, v in fast.state_dict().items()}
        names = {'from_coarser': 'up', 'from_finer': 'down'}
        for key, value in source.items():
            head, *rest = key.split('.')
            if head != 'laterals':
                state['.'.join([names.get(head, head), *rest])] = value
                continue
            level, rest = int(rest[0]), '.'.join(rest[1:])
            if level == 0:
                state[f'lateral.0.{rest}'] = value
            else:
                first, second = value.chunk(2) if value.dim() else (value, value)
                state[f'lateral.{level}.{rest}'], state[f'lateral2.{level - 1}.{rest}'] = first, second
        return state
