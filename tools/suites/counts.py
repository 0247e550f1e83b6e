"""What needs no clock, and no GPU: memory of the losses, kernels and host synchronisations of a training step."""

from functools import lru_cache
from typing import Dict, List, NamedTuple

import torch
import torch.nn.functional as F
from costs import Counts, held_bytes
from simulated_gpu import SimulatedGPU
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from selfkd.losses import TopK, distillation_kl, linear_pskd_loss, pskd_loss, soft_cross_entropy
from selfkd_torch import CSKD, FRSKD, PSKD, TokenPSKD

__all__ = ['kernel_suite', 'memory_suite', 'sync_suite']


class Logits(NamedTuple):
    """Shape of a loss: its logits, and the hidden states that they come from."""

    rows: int
    classes: int
    hidden: int
    dtype: torch.dtype


LLAMA = Logits(8192, 128000, 4096, torch.bfloat16)  # on the meta device, so that it costs nothing
CLASSES = 20


def memory_suite(size: str = 'small') -> List[Counts]:
    """The most that a loss, forward and backward, holds beside what it is given."""
    rows, classes, width, dtype = LLAMA

    def made(*shape):
        return torch.empty(*shape, dtype=dtype, device='meta').requires_grad_()

    logits, hidden, weight = made(rows, classes), made(rows, width), made(classes, width)
    labels = torch.zeros(rows, dtype=torch.long, device='meta')
    other = made(rows, classes).detach()
    top = TopK(made(rows, 8).detach(), torch.zeros(rows, 8, dtype=torch.long, device='meta'))
    losses = {
        'F.cross_entropy': (lambda: F.cross_entropy(logits, labels), [logits]),
        'pskd_loss, dense past': (lambda: pskd_loss(logits, labels, other, 0.4), [logits]),
        'pskd_loss, top-8 past': (lambda: pskd_loss(logits, labels, top, 0.4), [logits]),
        'soft_cross_entropy': (lambda: soft_cross_entropy(logits, other), [logits]),
        'distillation_kl': (lambda: distillation_kl(logits, other), [logits]),
        'F.linear, F.cross_entropy': (lambda: F.cross_entropy(F.linear(hidden, weight), labels), [hidden, weight]),
        'linear_pskd_loss': (lambda: linear_pskd_loss(hidden, weight, labels, top, 0.4), [hidden, weight]),
    }
    targets = {'pskd_loss, dense past': '2.5', 'soft_cross_entropy': '2.5', 'distillation_kl': '2.5'}
    targets['linear_pskd_loss'] = '3.4'
    found = []
    for name, (loss, inputs) in losses.items():
        peak = held_bytes(lambda loss=loss, inputs=inputs: torch.autograd.grad(loss(), inputs))
        found.append((name, f'{peak / 1e9:.3g}', targets.get(name, '')))
    title = (
        f'The most that a loss and its gradient hold beside what they are given, {rows} x {classes} logits in '
        f'{str(dtype)[6:]} from hidden states of {width}, counted on the meta device.'
    )
    return [Counts(title, ('', 'GB', 'target'), found)]


class Words(nn.Module):
    """The least language model."""

    def __init__(self, words: int):
        super().__init__()
        self.table, self.layer = nn.Embedding(words, 8), nn.Linear(8, words)

    def forward(self, lines):
        return self.layer(self.table(lines)).flatten(0, 1)


def _methods():
    """Name -> model, data, the method's maker and what a plain step of it is called."""
    import torchvision

    images = TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % CLASSES)
    lines = torch.randint(CLASSES, (8, 5))
    lines = TensorDataset(lines, lines)

    def network():
        return torchvision.models.resnet18(num_classes=CLASSES)

    def bank(loader, _, **options):
        return PSKD(loader, max_epochs=9, **options)

    makers = {
        'plain': None,
        'PS-KD, bank': bank,
        'PS-KD, bank, top-16': lambda loader, model: bank(loader, model, top_k=16),
        'PS-KD, snapshot': lambda loader, model: bank(loader, model, teacher='snapshot', model=model),
        'CS-KD': lambda loader, model: CSKD(loader, model, labels=images.tensors[1]),
        'FRSKD': lambda loader, model: FRSKD(model, example=images.tensors[0][:1]),
    }
    of_words = {
        'language model, plain': None,
        'language model, PS-KD, token bank': lambda loader, model: TokenPSKD(loader, max_epochs=9, top_k=8),
    }
    found = {name: (network, images, make) for name, make in makers.items()}
    found.update((name, (lambda: Words(CLASSES), lines, make)) for name, make in of_words.items())
    return found


@lru_cache(maxsize=None)
def count_steps() -> Dict[str, SimulatedGPU]:
    """What a step in the second epoch does on a GPU, forward, loss, backward and update."""
    return {name: _count(*parts) for name, parts in _methods().items()}


def _count(network, data, make) -> SimulatedGPU:
    torch.manual_seed(0)
    loader, model = DataLoader(data, batch_size=4), network()
    method = make and make(loader, model)
    with SimulatedGPU() as gpu:
        of_method = getattr(method, 'self_teacher', None), getattr(getattr(method, 'past', None), 'model', None)
        for module in filter(None, (model, *of_method)):
            gpu.put(module)
        parameters = [*model.parameters(), *(of_method[0].parameters() if of_method[0] else [])]
        optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, foreach=True)
        for _ in range(2):
            batches = method.batches() if hasattr(method, 'batches') else loader
            for x, y in batches:
                x, y = gpu.put(x), gpu.put(y.flatten())
                gpu.kernels = 0
                gpu.waits.clear()
                loss = (method.loss if method else F.cross_entropy)(model(x), y)
                loss.backward()
                optimizer.step()
                counted = gpu.kernels, dict(gpu.waits)
                optimizer.zero_grad()
    gpu.kernels, gpu.waits = counted
    return gpu


def kernel_suite(size: str = 'small') -> List[Counts]:
    """How many kernels a step starts."""
    targets = {'FRSKD': 'below 500'}
    rows = [(name, str(gpu.kernels), targets.get(name, '')) for name, gpu in count_steps().items()]
    title = (
        f"Kernels that a step starts, forward, backward and SGD's update, torchvision's ResNet-18 (64 x 64 pixels, "
        f'{CLASSES} classes) and a language model of one layer, counted on a simulated GPU.'
    )
    return [Counts(title, ('', 'kernels', 'target'), rows)]


def sync_suite(size: str = 'small') -> List[Counts]:
    """How often a step waits for the GPU."""
    rows = [(name, str(sum(gpu.waits.values())), '0') for name, gpu in count_steps().items()]
    title = 'How often a step waits for the GPU, from the second epoch on, counted on a simulated GPU.'
    return [Counts(title, ('', 'waits', 'target'), rows)]
