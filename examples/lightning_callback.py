"""PS-KD in Lightning: one callback, the LightningModule stays as it is (needs scikit-learn)."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import selfkd_lightning


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


digits = load_digits()
data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
pskd = selfkd_lightning.PSKD(alpha=0.3)
trainer = pl.Trainer(max_epochs=3, callbacks=[pskd], accelerator='cpu', logger=False, enable_checkpointing=False)
trainer.fit(Classifier(), DataLoader(data, batch_size=50, shuffle=True))
print(f'alpha {pskd.current_alpha:.1f}')
