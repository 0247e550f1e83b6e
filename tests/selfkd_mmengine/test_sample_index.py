"""Sample indices are unique and stable through every dataset wrapper, with forked and spawned workers."""

import pytest
from mm_runs import digits_config
from mmengine.runner import Runner

from selfkd_mmengine import SampleIndex


def leaf(digits, **options):
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    return dict(type='CustomDataset', data_root=str(digits), data_prefix='train', pipeline=pipeline, **options)


# wrapper -> (dataset config, number of different samples)
WRAPPERS = {
    'plain': (leaf, 40),
    'indices': (lambda d: leaf(d, indices=[3, 8, 30]), 3),
    'concat': (lambda d: dict(type='ConcatDataset', datasets=[leaf(d, indices=20), leaf(d, indices=[25, 30, 35])]), 23),
    'repeat': (lambda d: dict(type='RepeatDataset', times=2, dataset=leaf(d)), 40),
    'repeated concat': (
        lambda d: dict(
            type='RepeatDataset',
            times=2,
            dataset=dict(type='ConcatDataset', datasets=[leaf(d, indices=5), leaf(d, indices=[7, 9])]),
        ),
        7,
    ),
    'class balanced': (lambda d: dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=leaf(d)), 40),
    'k-fold': (lambda d: dict(type='KFoldDataset', num_splits=5, seed=0, dataset=leaf(d)), 32),
}


@pytest.mark.parametrize('name', WRAPPERS)
def test_unique_and_stable(digits, name):
    make, size = WRAPPERS[name]
    loader = Runner.build_dataloader(
        dict(batch_size=4, num_workers=0, dataset=make(digits), sampler=dict(type='DefaultSampler', shuffle=True)),
        seed=0,
    )
    index = SampleIndex(loader.dataset)
    assert len(index) == size
    path_of = {}
    for _ in range(2):
        for batch in loader:
            for row, sample in zip(index(batch).tolist(), batch['data_samples']):
                assert path_of.setdefault(row, sample.img_path) == sample.img_path
    assert sorted(path_of) == list(range(size))
    assert len(set(path_of.values())) == size
    index.remove()
    assert max(index(batch).max().item() for batch in loader) < 40


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_workers_number_samples_as_the_main_process_does(digits, start):
    dataset = WRAPPERS['repeated concat'][0](digits)
    loader = Runner.build_dataloader(
        dict(
            batch_size=5,
            num_workers=2,
            multiprocessing_context=start,
            dataset=dataset,
            sampler=dict(type='DefaultSampler', shuffle=False),
        )
    )
    index = SampleIndex(loader.dataset)
    rows = [row for batch in loader for row in index(batch).tolist()]
    assert rows == [0, 1, 2, 3, 4, 5, 6] * 2


def test_num_batch_per_epoch(digits, tmp_path):
    cfg = digits_config(digits, tmp_path, **{'train_dataloader.num_batch_per_epoch': 2})
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    index = SampleIndex(loader.dataset)
    assert len(index) == 40
    assert sorted(row for batch in loader for row in index(batch).tolist()) == list(range(16))


def test_no_sample_index_is_refused_with_the_way_out(digits):
    config = leaf(digits)
    config['pipeline'][1]['meta_keys'] = ('img_path',)
    loader = Runner.build_dataloader(
        dict(batch_size=4, num_workers=0, dataset=config, sampler=dict(type='DefaultSampler', shuffle=True))
    )
    index = SampleIndex(loader.dataset)
    with pytest.raises(
        ValueError, match="add 'sample_idx' to the meta_keys of PackInputs .* or set teacher='snapshot'"
    ):
        index(next(iter(loader)))
    with pytest.raises(ValueError, match=r"list: there is no sample index .* Set teacher='snapshot'"):
        SampleIndex([1, 2, 3])
