"""A number for every training sample that is unique over the whole training set, through dataset wrappers."""

from typing import List, Optional

import torch
from mmengine.dataset import BaseDataset
from mmengine.runner import Runner
from torch import Tensor

__all__ = ['OffsetSampleIdx', 'SampleIndex']

# Wrappers that hand on single samples of what they wrap. Others may mix several samples into one.
WRAPPERS = ('ConcatDataset', 'RepeatDataset', 'ClassBalancedDataset', 'KFoldDataset')


class OffsetSampleIdx:
    """Adds a constant to ``sample_idx``, which counts from 0 in every part of a ConcatDataset.

    It takes the place of a data set's ``get_data_info``: that goes with the data set into the workers, forked or
    spawned, and stays when the pipeline is exchanged (MMPretrain's SwitchRecipeHook does).
    """

    def __init__(self, dataset: BaseDataset, offset: int):
        self.dataset, self.offset = dataset, offset

    def __call__(self, idx: int) -> dict:
        info = type(self.dataset).get_data_info(self.dataset, idx)
        info['sample_idx'] += self.offset
        return info


class SampleIndex:
    """Finds each sample's row; ``len()`` is the number of different samples.

    Args:
        dataset: the training set. Where it has several parts, those after the first get an ``OffsetSampleIdx``,
            until ``remove``.

    Raises:
        ValueError: a dataset or wrapper without a sample index.
    """

    def __init__(self, dataset):
        self._leaves = _leaves(dataset)
        self._length = 0
        for leaf in self._leaves:
            if self._length:
                leaf.get_data_info = OffsetSampleIdx(leaf, self._length)
            self._length += len(leaf)

    @staticmethod
    def obstacle(dataset) -> Optional[str]:
        """Why there is no such number in a training set, if so."""
        try:
            leaves = _leaves(dataset)
        except ValueError as error:
            return str(error)
        for step in (step for leaf in leaves for step in getattr(leaf.pipeline, 'transforms', ())):
            if 'sample_idx' not in (*getattr(step, 'meta_keys', ['sample_idx']), *getattr(step, 'algorithm_keys', ())):
                return f"{type(step).__name__} in the training pipeline leaves out 'sample_idx' (meta_keys)"
        return None

    def check(self, dataset) -> None:
        """Refuses a training set that is not the one that was numbered, or not as long."""
        leaves = [] if self.obstacle(dataset) else _leaves(dataset)
        same = len(leaves) == len(self._leaves) and all(a is b for a, b in zip(leaves, self._leaves))
        if not same or sum(map(len, leaves)) != self._length:
            raise ValueError(
                'PSKDHook: the training set was exchanged in the middle of the run, and the bank has a row for each '
                "sample of the first one: keep the data set (its pipeline may change), or set teacher='snapshot'"
            )

    @classmethod
    def of_training(cls, runner: Runner) -> 'SampleIndex':
        """That of a runner's training set, for ``before_train``.

        An iteration-based loop has started its workers by then, whose data sets no change reaches any more: where one
        is made, the loop gets a data loader and workers anew, which begin where those began.

        Raises:
            ValueError: as above; or the workers cannot be started anew.
        """
        loop, started = runner.train_loop, runner.train_dataloader
        index = cls(started.dataset)
        if len(index._leaves) < 2 or not started.num_workers or not hasattr(loop, 'dataloader_iterator'):
            return index
        if not isinstance(runner._train_dataloader, dict):
            raise ValueError(
                'PSKDHook: an iteration-based loop starts its workers before the parts of the training set can be '
                "numbered: give train_dataloader as a config, or set num_workers=0, or teacher='snapshot'"
            )
        # The samplers hold how far they were read, so they are built anew as well; the dataset is the same.
        dataset = getattr(started.dataset, '_dataset', started.dataset)
        config = {**runner._train_dataloader, 'dataset': dict(type=lambda: dataset)}
        different = runner._randomness_cfg.get('diff_rank_seed', False)
        with torch.random.fork_rng(devices=[]):  # the loop has drawn its seed already
            loop.dataloader = runner.build_dataloader(config, seed=runner.seed, diff_rank_seed=different)
            loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)
        return index

    def __len__(self) -> int:
        return self._length

    def __call__(self, data_batch) -> Tensor:
        """Rows of a batch as the data loader gave it: int64 ``[B]``, on the CPU."""
        try:
            return torch.tensor([sample.sample_idx for sample in data_batch['data_samples']])
        except (AttributeError, KeyError, TypeError):
            raise ValueError(
                "The batch has no data_samples with a 'sample_idx': add 'sample_idx' to the meta_keys of PackInputs in "
                "the training pipeline, or set teacher='snapshot', which needs no sample index"
            ) from None

    def remove(self) -> None:
        for leaf in self._leaves:
            vars(leaf).pop('get_data_info', None)


def _leaves(dataset) -> List[BaseDataset]:
    dataset = getattr(dataset, '_dataset', dataset)  # mmengine's slice of num_batch_per_epoch
    name = type(dataset).__name__
    if name in WRAPPERS:
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
        parts = dataset.datasets if hasattr(dataset, 'datasets') else [dataset.dataset]
        leaves = [leaf for part in parts for leaf in _leaves(part)]
        return list({id(leaf): leaf for leaf in leaves}.values())
    if isinstance(dataset, BaseDataset):
        dataset.full_init()
        return [dataset]
    raise ValueError(
        f'{name} gives its samples no index (mmengine BaseDatasets do, alone or inside {", ".join(WRAPPERS)})'
    )
