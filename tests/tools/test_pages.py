"""The generated sections of the pages are those that tools/pages.py writes."""

import pages
import pytest


@pytest.mark.parametrize('page', pages.pages(), ids=lambda page: page.stem)
def test_generated_sections_are_up_to_date(page):
    text = page.read_text()
    assert pages.rewritten(text) == text, 'run python tools/pages.py'


def test_a_section_is_replaced_and_the_rest_stays():
    page = 'before\n<!-- options: selfkd_mmdet.CSKDHook -->\nold\n<!-- end -->\nafter'
    lines = pages.rewritten(page).split('\n')
    assert (lines[0], lines[-1]) == ('before', 'after')
    assert '| `weight` | `1.0` | Weight of the KL divergence. |' in lines
    assert pages.rewritten('\n'.join(lines)) == '\n'.join(lines)


def test_an_option_without_a_meaning_is_named(monkeypatch):
    monkeypatch.setitem(pages.OPTIONS, 'new', pages.Options('selfkd_mmdet/cskd_hook.py:CSKDHook', {'weight': ''}))
    with pytest.raises(ValueError, match='option temperature'):
        pages.options('new')


def test_old_names_and_settings_of_other_parts_are_no_options():
    table = pages.options('selfkd_fairseq.PSKD')
    assert '`--pskd-alpha` | `0.3`' in table
    assert 'pskd-past' not in table
    assert 'max-epoch' not in table


def test_costs_have_a_table_for_each_measured_step():
    assert [pages.cost(name).count('| time | memory') for name in ('fairseq', 'mmdet')] == [1, 4]
    assert '\n| PS-KD, token bank | ' in pages.cost('fairseq')  # whose table has a column more
    assert '\n| Deformable DETR, PS-KD | ' in pages.cost('mmdet')


def test_a_section_without_costs_is_named():
    with pytest.raises(ValueError, match='loss-full: there are no costs'):
        pages.cost('loss-full')
