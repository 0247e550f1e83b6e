"""Training loops of a user's own, over real scans of digits."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    TensorDataset,
)

EPOCHS = 3


@pytest.fixture(scope='module')
def digits():
    scans = load_digits()
    images = torch.tensor(scans.data[:60], dtype=torch.float32) / 16
    return TensorDataset(images, torch.tensor(scans.target[:60]))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))


def loader_of(data, **options):
    return DataLoader(data, **{'batch_size': 20, 'shuffle': True, **options})


def train(model, batches, loss_of, epochs=EPOCHS, after_step=lambda: None):
    """A user's loop; the losses of its steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    torch.manual_seed(1)
    losses = []
    for _ in range(epochs):
        for x, y in batches:
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after_step()
            losses.append(loss.item())
    return losses


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([self.data[i] for i in range(60)])


class LogSoftmaxLoss(nn.Module):
    """As timm's LabelSmoothingCrossEntropy."""

    def forward(self, x, target):
        log_probs = F.log_softmax(x, dim=-1)
        nll = -log_probs.gather(dim=-1, index=target.unsqueeze(1)).squeeze(1)
        return (0.9 * nll - 0.1 * log_probs.mean(dim=-1)).mean()
