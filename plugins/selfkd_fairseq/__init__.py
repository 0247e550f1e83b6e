r"""Self-knowledge distillation as fairseq criteria; an importable package and a ``--user-dir``.

    fairseq-train DATA --user-dir plugins/selfkd_fairseq --criterion pskd_label_smoothed_cross_entropy \
        --pskd-alpha 0.7 ...

Checkpoints made with it are ordinary ones: fairseq-generate needs no --user-dir.
"""

from . import criterions as _criterions  # noqa: F401  only registration
from . import cskd as _cskd  # noqa: F401
