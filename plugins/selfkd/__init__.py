"""Self-knowledge distillation: the shared math. Needs torch, and no toolkit.

PS-KD in an ordinary training loop (docs/torch.md has it with a real data set):

>>> import torch
>>> from selfkd.bank import PredictionBank
>>> from selfkd.losses import pskd_loss
>>> from selfkd.schedule import linear_growth
>>> _ = torch.manual_seed(0)
>>> images, labels, model = torch.randn(8, 4), torch.arange(8) % 2, torch.nn.Linear(4, 2)
>>> optimizer, max_epochs = torch.optim.SGD(model.parameters(), lr=0.5), 3
>>> bank = PredictionBank(num_samples=8, num_classes=2)
>>> for epoch in range(max_epochs):
...     alpha = linear_growth(0.8, (epoch + 1) / max_epochs)
...     for indices in torch.randperm(8).split(4):
...         logits = model(images[indices])
...         past, seen = bank.read(indices, return_seen=True)
...         loss = pskd_loss(logits, labels[indices], past, alpha * seen)
...         optimizer.zero_grad()
...         loss.backward()
...         optimizer.step()
...         bank.write(indices, logits.detach().softmax(1))
>>> bool(bank.seen(torch.arange(8)).all())
True
"""

from . import bank, losses, metrics, schedule, teacher

__version__ = '0.3.0'
__all__ = ['bank', 'losses', 'metrics', 'schedule', 'teacher']
