"""What is said of the difference between two methods' runs: SciPy's paired t test is the judge."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from selfkd.comparison import comparison_table, note, paired_difference, read_runs, verdict, write_runs


@pytest.mark.parametrize('pairs', [2, 5, 12])
def test_interval_and_verdict_are_those_of_scipys_paired_t_test(pairs):
    rng = np.random.default_rng(pairs)
    seen = set()
    for shift in np.linspace(-4, 4, 41):
        plain = rng.normal(10, 5, pairs)
        runs = plain + shift + rng.normal(0, 1, pairs)
        found = paired_difference(runs.tolist(), plain.tolist())
        test = ttest_rel(runs, plain)
        low, high = test.confidence_interval(0.95)
        assert found == pytest.approx((np.mean(runs - plain), low, high, pairs))
        clear = test.pvalue < 0.05
        expected = 'no clear difference' if not clear else 'better' if test.statistic < 0 else 'worse'
        assert verdict(found, 'lower') == expected
        mirrored = {'better': 'worse', 'worse': 'better'}.get(expected, expected)
        assert verdict(found, 'higher') == mirrored
        seen.add(expected)
    assert seen == {'better', 'worse', 'no clear difference'} or pairs == 2


def test_pairs_are_made_by_seed():
    """The method is 1 better for each seed; in the order given, the differences would be -9 and +7."""
    plain = [{'seed': 0, 'error': 10.0}, {'seed': 1, 'error': 2.0}]
    method = [{'seed': 1, 'error': 1.0}, {'seed': 0, 'error': 9.02}]
    table = comparison_table({'plain': plain, 'x': method}, {'error': ('error', 1, 2, 'lower')})
    assert '| -0.99 [-1.12, -0.86] better |' in table
    by_order = [[{'error': run['error']} for run in runs] for runs in (plain, method)]
    table = comparison_table({'plain': by_order[0], 'x': by_order[1]}, {'error': ('error', 1, 2, 'lower')})
    assert 'no clear difference |' in table


def test_seeds_that_one_group_lacks_make_no_pair():
    columns = {'error': ('error', 1, 1, 'lower')}
    three = [{'seed': seed, 'error': float(seed)} for seed in (0, 1, 2)]
    other = [{'seed': seed, 'error': 9.0} for seed in (2, 7)]
    table = comparison_table({'plain': three, 'x': other, 'y': other[1:]}, columns)
    assert '| x           | 1     | +7.0 one pair, no interval |' in table
    assert '| y           | 0     | no pairs                   |' in table
    with pytest.raises(ValueError, match='x: runs are compared seed by seed'):
        comparison_table({'plain': three, 'x': other + other}, columns)
    unknown = [{'error': 1.0}, {'error': 2.0}]  # neither a seed nor as many runs
    assert 'no pairs' in comparison_table({'plain': three, 'x': unknown}, columns)


def test_what_is_neither_good_nor_bad_is_not_compared():
    groups = {name: [{'temperature': 1.5}, {'temperature': 2.0}] for name in ('plain', 'x')}
    means, differences, *_ = comparison_table(groups, {'T': ('temperature', 1, 1, None)}).split('\n\n')
    assert '| T ' in means
    assert '| T ' not in differences


def test_saved_runs_give_the_same_table(tmp_path):
    rng = np.random.default_rng(0)
    panels = {
        panel: {name: [{'seed': s, 'error': rng.random()} for s in range(5)] for name in ('plain', 'PS-KD, 0.8')}
        for panel in ('clean labels', '20 % wrong labels')
    }
    write_runs(str(tmp_path / 'runs.csv'), panels)
    again = read_runs(str(tmp_path / 'runs.csv'))
    columns = {'error %': ('error', 100, 1, 'lower')}
    assert list(again) == list(panels)
    for panel, groups in panels.items():
        assert comparison_table(again[panel], columns) == comparison_table(groups, columns)


@pytest.mark.parametrize('strange', [math.nan, math.inf, -math.inf])
def test_of_what_is_not_a_number_nothing_is_said(strange):
    plain, runs = [1.0, 2.0, 3.0], [2.0, strange, 5.0]
    for better in ('lower', 'higher'):
        assert verdict(paired_difference(runs, plain), better) == 'no verdict, not a number'
        assert verdict(paired_difference([strange], [1.0]), better) == 'no verdict, not a number'
    groups = {name: [{'loss': value} for value in values] for name, values in (('plain', plain), ('x', runs))}
    assert 'no verdict, not a number |' in comparison_table(groups, {'loss': ('loss', 1, 1, 'lower')})


def test_the_note_says_how_the_runs_were_paired():
    seeded, unseeded = (
        [{'seed': 0, 'error': 1.0}, {'seed': 1, 'error': 2.0}],
        [{'error': 1.0}, {'seed': 1, 'error': 2.0}],
    )
    assert 'over the pairs of runs with the same seed (paired t)' in note({'plain': seeded, 'x': seeded})
    for plain, other in ((unseeded, seeded), (seeded, unseeded), (unseeded, unseeded)):
        text = note({'plain': plain, 'x': other})
        assert 'over the pairs of runs in the order given, as not every run has a seed (paired t)' in text
        assert 'same seed' not in text
    text = note({'plain': seeded, 'x': seeded}, {'plain': seeded, 'x': seeded, 'y': unseeded})
    assert 'with the same seed (y: in the order given, as not every run has a seed) (paired t)' in text


def test_a_table_of_runs_that_was_cut_is_named(tmp_path):
    path = tmp_path / 'runs.csv'
    write_runs(str(path), {'': {'plain': [{'seed': 0, 'error': 0.123456}]}})
    whole = path.read_text()
    for text in (whole[: whole.index('0.12')], 'name,error\nplain,1\n', whole.replace('0.123456', 'x')):
        path.write_text(text)
        with pytest.raises(ValueError, match='runs.csv: is no table of runs, or not a whole one'):
            read_runs(str(path))
