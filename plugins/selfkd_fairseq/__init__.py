"""Self-knowledge distillation as fairseq criteria; an importable package and a ``--user-dir``.

    fairseq-train DATA --user-dir plugins/selfkd_fairseq --criterion pskd_label_smoothed_cross_entropy --pskd-alpha 0.7 ...

Checkpoints made with it are ordinary ones: fairseq-generate needs no --user-dir.
"""

from . import criterions as _  # only registration
