"""What PS-KD's loss costs by itself, against torch's cross-entropy, and what its bank adds."""

from itertools import cycle
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

import torch
import torch.nn.functional as F
from costs import Table, compare, used_device

from selfkd.bank import PredictionBank
from selfkd.losses import TopK, linear_pskd_loss, pskd_loss

__all__ = ['bank_suite', 'loss_suite']


class Logits(NamedTuple):
    """Shape of a loss: its logits, and the hidden states that they come from."""

    rows: int
    classes: int
    dtype: torch.dtype
    repeats: int
    width: int


class Bank(NamedTuple):
    """Shape of a bank, and of what is read and written in a step."""

    samples: int
    classes: int
    batch: int
    repeats: int


LOSSES = dict(
    tiny=Logits(8, 50, torch.bfloat16, repeats=1, width=16),
    small=Logits(1024, 32000, torch.float32, repeats=20, width=512),
    full=Logits(8192, 128000, torch.bfloat16, repeats=20, width=4096),
)
BANKS = dict(
    tiny=Bank(40, 20, 8, repeats=1),
    small=Bank(50000, 100, 128, repeats=50),
    full=Bank(1281167, 1000, 128, repeats=200),
)


def loss_suite(size: str = 'small') -> List[Table]:
    """PS-KD's loss against ``torch.nn.functional.cross_entropy``, forward and backward."""
    rows, classes, dtype, repeats, width = LOSSES[size]
    device = used_device()
    torch.manual_seed(0)
    logits = torch.randn(rows, classes, device=device, dtype=dtype).requires_grad_()
    labels = torch.randint(classes, (rows,), device=device)
    past = torch.randn(rows, classes, device=device, dtype=dtype).softmax(1)
    top = TopK(*past.topk(8, 1))

    def step(loss):
        def run():
            loss().backward()
            logits.grad = None

        return run

    def composed():  # the target built, then torch's own loss
        target = 0.6 * F.one_hot(labels, classes).to(dtype) + 0.4 * past
        return F.cross_entropy(logits, target)

    def identity():  # how research scripts do it: the one-hot label is a row of an identity matrix
        target = 0.6 * torch.eye(classes, device=device)[labels] + 0.4 * past
        return torch.mean(torch.sum(-target * F.log_softmax(logits, dim=1), dim=1))

    candidates = {
        'F.cross_entropy': step(lambda: F.cross_entropy(logits, labels)),
        'pskd_loss, dense past': step(lambda: pskd_loss(logits, labels, past, 0.4)),
        'pskd_loss, top-8 past': step(lambda: pskd_loss(logits, labels, top, 0.4)),
        'target built, then F.cross_entropy': step(composed),
    }
    if classes < 100_000:  # a matrix of 40 GB and more
        candidates['identity matrix, sum of products'] = step(identity)
    title = (
        f"PS-KD's loss against `torch.nn.functional.cross_entropy`, {rows} x {classes} logits of {str(dtype)[6:]}, "
        'forward and backward.'
    )
    return [Table(title, compare(candidates, repeats=repeats)), _from_hidden_states(LOSSES[size], labels, top)]


def _from_hidden_states(shape: Logits, labels: torch.Tensor, top: TopK) -> Table:
    """The last layer and the loss in one, whose logits never exist as a whole."""
    options = dict(device=labels.device, dtype=shape.dtype)
    hidden = torch.randn(shape.rows, shape.width, **options).requires_grad_()
    weight = (0.02 * torch.randn(shape.classes, shape.width, **options)).requires_grad_()

    def step(loss):
        def run():
            loss().backward()
            hidden.grad = weight.grad = None

        return run

    candidates = {
        'F.linear, F.cross_entropy': step(lambda: F.cross_entropy(F.linear(hidden, weight), labels)),
        'F.linear, pskd_loss, top-8 past': step(lambda: pskd_loss(F.linear(hidden, weight), labels, top, 0.4)),
        'linear_pskd_loss, top-8 past': step(lambda: linear_pskd_loss(hidden, weight, labels, top, 0.4)),
    }
    title = f'The same from hidden states of {shape.width}: the last layer is computed as well.'
    return Table(title, compare(candidates, repeats=shape.repeats))


def bank_suite(size: str = 'small') -> List[Table]:
    """Reading past predictions, PS-KD's loss, its backward pass, and writing the new ones: with the bank on the CPU and
    on the GPU, if there is one, of whole rows in half precision and of top-16."""
    shape = BANKS[size]
    device = used_device()
    torch.manual_seed(0)
    logits = torch.randn(shape.batch, shape.classes, device=device).requires_grad_()
    labels = torch.randint(shape.classes, (shape.batch,), device=device)

    def plain() -> None:
        F.cross_entropy(logits, labels).backward()
        logits.grad = None

    candidates: Dict[str, Callable[[], object]] = {'F.cross_entropy, no bank': plain}
    kinds: Dict[str, Dict[str, Any]] = {'float16': dict(dtype=torch.float16), 'top-16': dict(top_k=16)}
    for place in dict.fromkeys(['cpu', device.type]):
        for name, settings in kinds.items():
            bank = PredictionBank(shape.samples, shape.classes, device=place, **settings)
            _fill(bank)
            step = _bank_step(bank, _random_batches(shape), logits, labels)
            candidates[f'bank on {place}, {name}, {bank.nbytes / 1e9:.3g} GB'] = step
    title = (
        f"The bank: reading, PS-KD's loss, its backward pass and writing, batch {shape.batch} of {shape.samples} "
        f'samples of {shape.classes} classes.'
    )
    return [Table(title, compare(candidates, repeats=shape.repeats))]


def _fill(bank: PredictionBank) -> None:
    """As after the first epoch: every row is known, and no page of the table is touched for the first time later."""
    for indices in torch.arange(bank.num_samples).split(8192):
        bank.write(indices, torch.rand(len(indices), bank.num_classes).softmax(1))


def _random_batches(shape: Bank) -> Iterator[torch.Tensor]:
    order = torch.randperm(shape.samples)
    return cycle(order[: len(order) // shape.batch * shape.batch].split(shape.batch))


def _bank_step(bank: PredictionBank, batches: Iterator[torch.Tensor], logits, labels) -> Callable[[], None]:
    def step() -> None:
        indices = next(batches)
        past, seen = bank.read(indices, return_seen=True)
        alpha = 0.4 * seen.to(logits.device, non_blocking=True)
        pskd_loss(logits, labels, past.to(logits.device, non_blocking=True), alpha).backward()
        bank.write(indices, logits.detach().softmax(1))
        logits.grad = None

    return step
