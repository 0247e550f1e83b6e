"""PS-KD in a training loop of your own: digits of 8 x 8 pixels, seconds on a CPU (needs scikit-learn)."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from selfkd.metrics import calibration_error
from selfkd_torch import PSKD

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:800], labels[:800]), batch_size=50, shuffle=True)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

pskd = PSKD(loader, num_classes=10, alpha=0.3, max_epochs=20)
for _ in range(20):
    for x, y in pskd.batches():  # was: in loader
        loss = pskd.loss(model(x), y)  # was: F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f'alpha {pskd.current_alpha:.2f}, of the loss {float(pskd.logs["pskd_soft"]):.3f} is the past')

probs = model(images[800:]).detach().softmax(1)
error = (probs.argmax(1) != labels[800:]).float().mean().item()
print(f'error {100 * error:.1f} %, ECE {100 * calibration_error(probs, labels[800:]):.1f} %')
