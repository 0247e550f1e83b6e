"""Sample indices are unique and stable through every dataset wrapper, with forked and spawned workers."""

import multiprocessing

import pytest
from helpers.mmengine import Recorder, assert_same_state, by_iterations, digits_config, find_hook, train
from mmengine.config import ConfigDict
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
    assert (
        SampleIndex.obstacle(loader.dataset)
        == "PackInputs in the training pipeline leaves out 'sample_idx' (meta_keys)"
    )
    with pytest.raises(ValueError, match='list gives its samples no index'):
        SampleIndex([1, 2, 3])


@pytest.fixture(scope='module')
def without_workers(digits, tmp_path_factory):
    return trained_on_three_parts(digits, tmp_path_factory.mktemp('run'), num_workers=0)


def trained_on_three_parts(digits, folder, pairs=False, **loader):
    """12 iterations on 60 images in three folders: what they were trained on, the final bank, and the weights."""
    cfg = by_iterations(digits_config(digits, folder, dict(type='selfkd_mmpretrain.PSKDHook')), 12)
    if pairs:
        cfg.custom_hooks.append(ConfigDict(type='selfkd_mmpretrain.CSKDHook'))
        cfg.train_dataloader.batch_sampler = dict(type='selfkd_mmengine.PairBatchSampler')
    parts = [('train', 20), ('train', range(20, 40)), ('test', 20)]
    parts = [{**leaf(digits, indices=indices), 'data_prefix': part} for part, indices in parts]
    cfg.train_dataloader.update(loader)
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=parts)
    before = set(multiprocessing.active_children())
    runner = train(cfg, recorder := Recorder())
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == cfg.train_dataloader.num_workers  # those that the loop started first have gone
    return recorder.steps, find_hook(runner, 'PSKDHook').past.bank.state_dict(), runner.model.state_dict()


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_an_iteration_based_loops_workers_know_the_parts(digits, tmp_path, start, without_workers):
    """It starts them before any hook is asked; training is what it is without workers."""
    options = dict(multiprocessing_context=start, persistent_workers=start == 'spawn')
    steps, bank, weights = trained_on_three_parts(digits, tmp_path, num_workers=2, **options)
    assert len({path for step in steps for path in step['paths']}) == 60
    assert bank['seen'].tolist() == [True] * 60
    expected_steps, expected_bank, expected_weights = without_workers
    assert [step['paths'] for step in steps] == [step['paths'] for step in expected_steps]
    assert_same_state(bank, expected_bank)
    assert_same_state(weights, expected_weights)


def test_workers_anew_begin_where_the_first_began_with_a_batch_sampler_too(digits, tmp_path):
    runs = [trained_on_three_parts(digits, tmp_path / str(n), pairs=True, num_workers=n) for n in (0, 2)]
    assert [step['paths'] for step in runs[0][0]] == [step['paths'] for step in runs[1][0]]
    assert_same_state(runs[0][1:], runs[1][1:])


def test_workers_of_a_ready_made_loader_are_refused(digits, tmp_path):
    cfg = by_iterations(digits_config(digits, tmp_path, dict(type='selfkd_mmpretrain.PSKDHook')), 12)
    cfg.train_dataloader.num_workers, cfg.train_dataloader.dataset = 1, WRAPPERS['concat'][0](digits)
    runner = Runner.from_cfg(cfg)
    runner._train_dataloader = Runner.build_dataloader(runner._train_dataloader, seed=0)
    with pytest.raises(ValueError, match="give train_dataloader as a config, or set num_workers=0, or teacher='snap"):
        runner.train()
