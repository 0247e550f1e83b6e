"""What a training step costs with each method, against the plain step, in a user's own loop."""

import copy
from typing import Iterator, List, NamedTuple

import torch
import torch.nn.functional as F
from costs import Table, compare, used_device
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from selfkd_torch.pskd import PSKD

__all__ = ['step_suite']

EPOCHS = 1000  # more than a measurement takes


class Shape(NamedTuple):
    """Of a training step."""

    network: str
    batch: int
    pixels: int
    classes: int
    amp: bool
    repeats: int


FULL = Shape('resnet50', 128, 224, 1000, amp=True, repeats=24)
SHAPES = dict(
    tiny=FULL._replace(network='resnet18', batch=2, pixels=32, classes=20, repeats=1),
    small=Shape('resnet18', 32, 64, 100, amp=False, repeats=24),
    full=FULL,
)


def make_step(model: nn.Module, data: TensorDataset, shape: Shape, **settings):
    """One training step, batch included, of a run in its second epoch, where past predictions exist."""
    device = used_device()
    model = model.to(device)
    loader = DataLoader(data, batch_size=shape.batch, shuffle=True)
    batches, loss_of = loader, F.cross_entropy
    if settings:
        settings.update(dict(model=model) if settings.get('teacher') == 'snapshot' else dict(num_classes=shape.classes))
        pskd = PSKD(loader, max_epochs=EPOCHS, **settings)
        batches, loss_of = pskd.batches(), pskd.loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.cuda.amp.GradScaler(enabled=shape.amp and device.type == 'cuda')

    def steps() -> Iterator[None]:
        while True:
            for images, labels in batches:
                images, labels = images.to(device), labels.to(device)
                with torch.autocast(device.type, enabled=shape.amp):
                    loss = loss_of(model(images), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                yield

    running = steps()
    for _ in range(len(loader) + 1):
        next(running)
    return lambda: next(running)


def step_suite(size: str = 'small') -> List[Table]:
    """A whole step of torchvision's ResNets in a training loop of your own."""
    import torchvision

    shape = SHAPES[size]
    network, batch, pixels, classes, amp, repeats = shape
    model = getattr(torchvision.models, network)(num_classes=classes)
    # On the device already: sending them there would hide what a method adds.
    images = torch.randn(4 * batch, 3, pixels, pixels).to(used_device())
    data = TensorDataset(images, torch.randint(classes, (4 * batch,)))

    def step(**settings):
        return make_step(copy.deepcopy(model), data, shape, **settings)

    costs = compare(
        {
            'plain': step(),
            'PS-KD, bank': step(alpha=0.8),
            'PS-KD, bank, top-16': step(alpha=0.8, top_k=16),
            'PS-KD, snapshot': step(alpha=0.8, teacher='snapshot'),
        },
        repeats=repeats,
    )
    title = (
        f"Your own loop: a whole step of torchvision's {network}, batch {batch}, {pixels} x {pixels} images, "
        f'{classes} classes{", autocast" if amp else ""}.'
    )
    return [Table(title, costs)]
