"""PS-KD around a training function that you cannot edit: tap() softens the cross-entropy that it computes."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from selfkd_torch import PSKD


def train_one_epoch(model, criterion, optimizer, data_loader):
    """Stands for somebody else's function, such as torchvision's reference scripts have."""
    for images, labels in data_loader:
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


data = TensorDataset(torch.randn(64, 8), torch.randint(4, (64,)))
model, criterion = nn.Linear(8, 4), nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

pskd = PSKD(DataLoader(data, batch_size=16), num_classes=4, alpha=0.3, max_epochs=3)
for _ in range(3):
    with pskd.tap():
        train_one_epoch(model, criterion, optimizer, pskd.batches())
print(f'alpha {pskd.current_alpha:.1f}')
