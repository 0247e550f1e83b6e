"""A bank of tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
)

from selfkd_torch import TokenPSKD
from selfkd_torch.tokens import _lengths


class Sentences(Dataset):
    lengths = [3, 5, 2, 4, 1, 5]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        ids = torch.arange(self.lengths[index]) + index
        return dict(input_ids=ids, labels=ids % 7)


class Counting(Sentences):
    """Counts the samples that are asked for; may say how long they are."""

    def __init__(self, **sizes):
        self.asked = 0
        vars(self).update(sizes)

    def __getitem__(self, index):
        self.asked += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ('sizes', 'asked'),
    [
        (dict(sizes=torch.tensor(Sentences.lengths)), 1),
        (dict(sizes=torch.zeros(6, 2), tgt_sizes=Sentences.lengths), 1),
        ({}, 6),
        (dict(sizes=[1] * 6), 7),  # of something else
        (dict(sizes=Sentences.lengths[:5]), 6),
        (dict(sizes=[size + 0.5 for size in Sentences.lengths]), 6),
    ],
)
def test_samples_are_not_read_where_the_data_set_says_how_long_they_are(sizes, asked):
    dataset = Counting(**sizes)
    assert _lengths(dataset) == Sentences.lengths
    assert dataset.asked == asked


def padded(samples):
    return nn.utils.rnn.pad_sequence([sample['labels'] for sample in samples], True, -100)


def test_a_loss_whose_logits_never_exist():
    def losses(linear):
        loader = DataLoader(Sentences(), batch_size=2, shuffle=True, collate_fn=padded)
        pskd, values = TokenPSKD(loader, alpha=0.8, max_epochs=3, top_k=4), []
        torch.manual_seed(0)
        weight, bias = torch.randn(7, 5), torch.randn(7)
        for _ in range(3):
            for y in pskd.batches():
                hidden = torch.randn(y.numel(), 5)
                if linear:
                    loss = pskd.linear_loss(hidden, weight, y.flatten(), bias=bias)
                else:
                    loss = pskd.loss(F.linear(hidden, weight, bias), y.flatten())
                values += [loss.item(), *(float(value) for value in pskd.logs.values())]
        return values

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)
    copied = TokenPSKD(DataLoader(Sentences()), max_epochs=2, model=nn.Linear(5, 7), teacher='snapshot')
    batches = iter(copied.batches())
    next(batches)
    with pytest.raises(ValueError, match="needs a bank of tokens: set teacher='bank'"):
        copied.linear_loss(copied.model(torch.randn(3, 5)), torch.randn(7, 7), torch.zeros(3).long())


def test_a_bank_of_tokens():
    """Each token learns from what was predicted for it, whatever its sentence is padded to beside others."""
    loader = DataLoader(Sentences(), batch_size=2, shuffle=True, collate_fn=padded)
    pskd, past = TokenPSKD(loader, alpha=0.8, max_epochs=3, top_k=7), {}
    torch.manual_seed(0)
    for epoch in range(3):
        for y in pskd.batches():
            logits, terms = torch.randn(*y.shape, 7), []
            loss = pskd.loss(logits.flatten(0, 1), y.flatten())
            for row, line, labels in zip(pskd._rows.tolist(), logits, y):
                for place, label in enumerate(labels[labels != -100]):
                    old = past.get((row, place))
                    alpha = 0 if old is None else 0.8 * (epoch + 1) / 3
                    target = (1 - alpha) * F.one_hot(label, 7) + (alpha * old if alpha else 0)
                    terms.append(-(target * line[place].log_softmax(0)).sum())
                    past[row, place] = line[place].softmax(0)
            assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-3)
    assert pskd.bank.num_samples == 20
    again = TokenPSKD(loader, alpha=0.8, max_epochs=3, top_k=7)
    again.load_state_dict(pskd.state_dict())
    for method, change, message in (
        (
            pskd,
            lambda y: y + (y >= 0).long(),
            'had the label 0 before, and has the label 1 now .*masked language modelling',
        ),
        (again, lambda y: torch.ones(2, 9).long(), 'has more labels than when the bank was made'),
    ):
        method.data.epoch = 2
        running = iter(method.batches())
        y = change(next(running)).flatten()
        with pytest.raises(ValueError, match=message):
            method.loss(torch.randn(len(y), 7), y)
