"""What a training step costs with each method, against the plain step, in a user's own loop."""

import copy
from typing import Iterator, List

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from selfkd.benchmark import Cost, compare

from .pskd import PSKD

__all__ = ['step_suite']

EPOCHS = 1000  # more than a measurement takes


def make_step(model: nn.Module, **settings):
    """One training step, batch included, of a run in its second epoch, where past predictions exist."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model = model.to(device)
    data = TensorDataset(torch.randn(128, 3, 64, 64), torch.randint(100, (128,)))
    loader = DataLoader(data, batch_size=32, shuffle=True)
    batches, loss_of = loader, F.cross_entropy
    if settings:
        settings.update(dict(model=model) if settings.get('teacher') == 'snapshot' else dict(num_classes=100))
        pskd = PSKD(loader, max_epochs=EPOCHS, **settings)
        batches, loss_of = pskd.batches(), pskd.loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def steps() -> Iterator[None]:
        while True:
            for images, labels in batches:
                images, labels = images.to(device), labels.to(device)
                loss = loss_of(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield

    running = steps()
    for _ in range(len(loader) + 1):
        next(running)
    return lambda: next(running)


def step_suite() -> List[Cost]:
    """A loop of one's own: a whole step of torchvision's ResNet-18, batch 32, 64 x 64 images, 100 classes."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=100)
    return compare(
        {
            'plain': make_step(copy.deepcopy(model)),
            'PS-KD, bank': make_step(copy.deepcopy(model), alpha=0.8),
            'PS-KD, bank, top-16': make_step(copy.deepcopy(model), alpha=0.8, top_k=16),
            'PS-KD, snapshot': make_step(copy.deepcopy(model), alpha=0.8, teacher='snapshot'),
        },
        repeats=24,
    )
