"""RowLabels: samples that are not those of their rows are noticed."""

import pytest
import torch

from selfkd.bank import PredictionBank
from selfkd.pairing import SameClassPairing
from selfkd.row_labels import RowLabels


def test_a_sample_with_another_label_is_refused_and_its_row_keeps_the_old_one():
    rows = RowLabels(6)
    rows.check(torch.tensor([4, 1, 3]), torch.tensor([0, 2, -100]))
    with pytest.raises(ValueError, match=r'row 1 had the label 2 before, and has the label 0 .* or use the snapshot'):
        rows.check(torch.tensor([1, 4, 3]), torch.tensor([0, 2, -100]), way_out='use the snapshot')
    rows.check(torch.tensor([1, 4, 3, 0]), torch.tensor([2, 0, -100, 9]))


def test_soft_labels_are_told_apart_and_their_rounding_is_not():
    soft = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)).softmax(1)
    rows, order = RowLabels(5), torch.arange(5)
    rows.check(order, soft)
    rows.check(order, soft.half().float())
    with pytest.raises(ValueError, match=r'\(5 of 5 rows differ\)'):
        rows.check(order, soft.roll(1, 0))
    rows = RowLabels(2)
    rows.check(torch.tensor([0, 1]), torch.tensor([3, 1]))
    rows.check(torch.tensor([0, 1]), torch.eye(4)[[3, 1]])  # the same labels as probs


def test_labels_and_rows_of_different_number_are_refused():
    with pytest.raises(ValueError, match='a label for each of 2 samples'):
        RowLabels(3).check(torch.tensor([0, 1]), torch.tensor([1]))


def test_a_bank_keeps_them_in_its_state_so_that_another_data_set_is_refused_on_resume():
    bank, everything = PredictionBank(4, 3), torch.arange(4)
    plain = bank.nbytes
    bank.check_labels(everything, torch.tensor([0, 1, 2, 0]))
    assert bank.nbytes == plain + 4 * 4
    resumed = PredictionBank(4, 3)
    resumed.load_state_dict(bank.state_dict())
    resumed.check_labels(everything[1:], torch.tensor([1, 2, 0]))
    with pytest.raises(ValueError, match='resumed with another data set'):
        resumed.check_labels(everything, torch.tensor([1, 2, 0, 0]))


def test_pairs_know_the_class_of_every_row():
    pairing = SameClassPairing([3, 1, 3, 1])
    pairing.check_labels(torch.tensor([2, 1]), torch.tensor([3, 1]))
    with pytest.raises(ValueError, match='row 0 had the label 3'):
        pairing.check_labels(torch.tensor([0, 1]), torch.tensor([1, 3]))
