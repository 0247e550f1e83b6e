"""Batches of pairs over any mmengine dataset and sampler: of one class for CS-KD, of one image for DDGSD."""

from typing import Any, Iterator, List, Optional, Tuple

import torch
from mmengine.dist import get_rank, sync_random_seed
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import BatchSampler, DataLoader

from selfkd.pairing import SameClassPairing

__all__ = ['PairBatchSampler', 'ViewBatchSampler', 'class_of_each', 'with_batch_sampler']


@DATA_SAMPLERS.register_module()
class PairBatchSampler(BatchSampler):
    """Yields B anchors followed by B partners of the same classes.

    The anchors are those that the sampler gives; partners are drawn uniformly from all training samples of the
    anchor's class (on every rank from the whole training set). The draws follow from the sampler's seed, its epoch and
    the rank alone, so a resumed epoch has the pairs it would have had. CSKDHook takes the partners out of the batch
    again.

        train_dataloader = dict(batch_sampler=dict(type='selfkd_mmengine.PairBatchSampler'))

    Args:
        sampler: gives the anchors; knows its ``dataset``, as mmengine's samplers do.
        batch_size: B.
        drop_last: leave out a last batch that is not full.
        seed: of the partners. Defaults to the sampler's own, or a random one that all ranks agree on.

    Raises:
        ValueError: the dataset cannot tell the class of each sample.
    """

    def __init__(self, sampler, batch_size: int, drop_last: bool = False, seed: Optional[int] = None):
        super().__init__(sampler, batch_size, drop_last)
        if not hasattr(sampler, 'dataset'):
            raise ValueError(
                f'PairBatchSampler: the sampler must know its dataset, {type(sampler).__name__} does not: use '
                'DefaultSampler or InfiniteSampler'
            )
        self.pairing = SameClassPairing(class_of_each(sampler.dataset))
        if seed is None:
            seed = getattr(sampler, 'seed', None)
        self.seed = sync_random_seed() if seed is None else seed

    def __iter__(self) -> Iterator[List[int]]:
        seed = (self.seed * 1_000_003 + getattr(self.sampler, 'epoch', 0)) * 1_000_003 + get_rank()
        generator = torch.Generator().manual_seed(seed % 2**63)
        for anchors in super().__iter__():
            yield anchors + self.pairing.draw(anchors, generator).tolist()


@DATA_SAMPLERS.register_module()
class ViewBatchSampler(BatchSampler):
    """Yields the B samples of a batch, and once more: with random augmentation, two views of each."""

    def __init__(self, sampler, batch_size: int, drop_last: bool = False):
        super().__init__(sampler, batch_size, drop_last)

    def __iter__(self) -> Iterator[List[int]]:
        for batch in super().__iter__():
            yield batch + batch


def class_of_each(dataset) -> List[int]:
    """The class id of every sample, from the annotations alone: no image is read."""
    dataset = getattr(dataset, '_dataset', dataset)  # mmengine's slice of num_batch_per_epoch: partners come from all
    name = type(dataset).__name__
    if not hasattr(dataset, 'get_data_info'):
        raise ValueError(
            f'{name}: cannot tell the class of a sample without loading it (no get_data_info), so CS-KD cannot draw '
            'same-class partners. Use an mmengine BaseDataset, or one of its wrappers'
        )
    labels = [dataset.get_data_info(i).get('gt_label') for i in range(len(dataset))]
    for i, label in enumerate(labels):
        if getattr(label, 'ndim', 0) or not hasattr(label, '__index__') or label < 0:
            raise ValueError(
                f'{name}: CS-KD needs one class per sample, but sample {i} has gt_label={label!r}. Multi-label data '
                'and data without labels cannot be paired by class'
            )
    return [int(label) for label in labels]


def with_batch_sampler(loader: DataLoader, kind: type) -> DataLoader:
    """The same data loader with a batch sampler of this kind in place of its own."""
    plain: Any = loader.batch_sampler  # a torch BatchSampler, or one like it
    pairs = kind(plain.sampler, plain.batch_size, plain.drop_last)
    names: Tuple[str, ...] = (
        'num_workers',
        'collate_fn',
        'pin_memory',
        'timeout',
        'worker_init_fn',
        'multiprocessing_context',
        'generator',
    )
    names += ('prefetch_factor', 'persistent_workers', 'pin_memory_device')
    return DataLoader(loader.dataset, batch_sampler=pairs, **{name: getattr(loader, name) for name in names})
