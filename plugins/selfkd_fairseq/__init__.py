r"""Self-knowledge distillation as fairseq criteria; an importable package and a ``--user-dir``.

    fairseq-train DATA --user-dir plugins/selfkd_fairseq --criterion pskd_label_smoothed_cross_entropy \
        --pskd-alpha 0.3 ...

Checkpoints made with it are ordinary ones: fairseq-generate needs no --user-dir. (With torch 2.6 and later fairseq
alone does not load its own checkpoints: docs/fairseq.md.)
"""

import argparse

import torch

from . import criterions as _criterions  # noqa: F401  only registration
from . import cskd as _cskd  # noqa: F401

# fairseq's checkpoints hold the model's settings as a Namespace of plain values, at which torch.load stops from 2.6 on.
if hasattr(torch.serialization, 'add_safe_globals'):
    torch.serialization.add_safe_globals([argparse.Namespace])
