"""What PS-KD counts is what training does: in loops by epoch and by iteration, over all ranks."""

import json

import pytest
from helpers.processes import run_module

PASS = 5  # batches of 8 in 39 images


@pytest.fixture(scope='module')
def counts(digits, tmp_path_factory):
    """number of processes -> what loops_worker.py counted on each rank, with the same global batch"""
    folder = tmp_path_factory.mktemp('loops')
    run_module('helpers.loops_worker', digits, folder, folder=folder)
    return {n: [json.loads((folder / f'{n}-{rank}.json').read_text()) for rank in range(n)] for n in (1, 2, 4)}


def test_a_single_process_counts_passes_over_the_data(counts):
    (single,) = counts[1]
    for name, count in single.items():
        by_epoch, period = name.startswith('epochs'), 3 if 'num_batch_per_epoch' in name else PASS
        alphas = [0.8 * (step // PASS + 1) / 3 for step in range(15)]
        if not by_epoch:
            alphas = [0.8 * (step // period * period) / 12 for step in range(12)]
        assert count['period'] == period, name
        assert count['alphas'] == pytest.approx(alphas, abs=1e-5), name
        starts = list(range(period, len(alphas), period))
        if 'buffers' in count:
            assert count['refreshes'] == starts, name
        else:
            # after an epoch's last step, whose number has been counted up by then, or after the period's last
            assert {step if by_epoch else step - 1 for step in starts} <= set(count['exchanges']), name


@pytest.mark.parametrize('processes', [2, 4])
def test_several_processes_count_as_one_with_the_same_global_batch(counts, processes):
    (single,) = counts[1]
    for rank in counts[processes]:
        assert rank.keys() == (single.keys() if processes == 2 else set(list(single)[:4]))
        for name, count in rank.items():
            for key in ('period', 'alphas', 'refreshes', 'exchanges'):
                assert count[key] == single[name][key], (name, key)


@pytest.mark.parametrize('processes', [2, 4])
def test_the_past_copy_is_the_same_on_every_rank(counts, processes):
    """The running statistics of batch norms, which it uses in evaluation mode, are each rank's own in the student."""
    for name in ('iterations, snapshot', 'iterations, snapshot in eval mode'):
        first, *others = [rank[name]['buffers'] for rank in counts[processes]]
        assert all(other == first for other in others), name
