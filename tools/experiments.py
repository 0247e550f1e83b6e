"""What `python tools/evidence.py run NAME` trains: a list of runs, methods x seeds, for each experiment.

Methods stand in the order of their value, plain training first: all of them are trained with one seed before the next
seed's turn. Keys of settings and methods: tools/cifar.py.
"""

from typing import Dict, NamedTuple


class Experiment(NamedTuple):
    """Attributes:
    title: of its page.
    settings: what all its runs share.
    methods: name -> what differs; the others are compared with the first one.
    seeds: how many.
    """

    title: str
    settings: dict
    methods: Dict[str, dict]
    seeds: int = 5


CIFAR = dict(labels=4000, held_out=1000, noise=0.0, epochs=40, milestones=[0.5, 0.75], batch=64, lr=0.1)
METHODS = {
    'plain': {},
    'label smoothing': dict(label_smoothing=0.1),
    'PS-KD 0.3 + label smoothing': dict(pskd=dict(alpha=0.3), label_smoothing=0.1),
    'PS-KD 0.3': dict(pskd=dict(alpha=0.3)),
    'CS-KD': dict(cskd={}),
    'PS-KD 0.8': dict(pskd=dict(alpha=0.8)),
    'PS-KD 0.3 + CS-KD': dict(pskd=dict(alpha=0.3), cskd={}),
    'FRSKD': dict(frskd={}),
}
STORAGE = {
    'whole rows': dict(pskd=dict(alpha=0.8)),
    'top-2': dict(pskd=dict(alpha=0.8, top_k=2)),  # the rest spread evenly over the other classes
}
EXPERIMENTS = {
    'cifar10-4000': Experiment('CIFAR-10, 4,000 labels', CIFAR, METHODS),
    'cifar10-10000-noisy': Experiment(
        'CIFAR-10, 10,000 labels, 40 % of them wrong', dict(CIFAR, labels=10000, noise=0.4, epochs=30), METHODS
    ),
    'bank-storage': Experiment('What the bank keeps: CIFAR-10, 4,000 labels', CIFAR, STORAGE),
}
