"""CS-KD's pairs: for each sample another one of its class."""

from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

__all__ = ['SameClassPairing', 'same_class_partners']


class SameClassPairing:
    """Draws for each sample a partner uniformly from the training samples of its class (it may be the sample itself).

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020, section 2.1
    https://arxiv.org/abs/2003.13964
    Drawing costs two look-ups per sample, whatever the size of the training set, and touches no data.

    Args:
        labels: class id of every training sample, ``[N]``.

    Example:
        >>> pairing = SameClassPairing([0, 1, 0, 2])
        >>> pairing.draw([1, 3])  # a class with a single sample: its partner is itself
        tensor([1, 3])
        >>> bool(torch.isin(pairing.draw([0, 0, 0]), torch.tensor([0, 2])).all())
        True
    """

    def __init__(self, labels: Union[Sequence[int], Tensor]):
        labels = torch.as_tensor(labels)
        if labels.dim() != 1 or labels.is_floating_point() or not len(labels) or labels.min() < 0:
            raise ValueError(
                'labels: must be one class id (an integer of at least 0) per sample, [N] with N > 0, got '
                f'{labels.dtype}, '
                f'{tuple(labels.shape)}'
            )
        self._labels = labels.long()
        self._members = self._labels.argsort(stable=True)  # samples, class by class
        self._count = self._labels.bincount()
        self._start = self._count.cumsum(0) - self._count

    def __len__(self) -> int:
        return len(self._labels)

    def draw(self, indices: Union[Sequence[int], Tensor], generator: Optional[torch.Generator] = None) -> Tensor:
        """Partners of samples.

        Args:
            indices: ``[B]``, in [0, N).
            generator: of the random numbers; torch's global one by default.

        Returns:
            sample indices ``[B]``, int64.
        """
        label = self._labels[torch.as_tensor(indices, dtype=torch.long)]
        share = torch.rand(len(label), dtype=torch.float64, generator=generator)
        return self._members[self._start[label] + (share * self._count[label]).long()]


def same_class_partners(labels: Tensor, ignore: Optional[int] = None) -> Tuple[Tensor, Tensor]:
    """Pairs within a batch, for tokens or regions: each takes the next one of its class, the last of them the first.

    Args:
        labels: class ids ``[N]``.
        ignore: this class (padding, background) has no partners.

    Returns:
        the samples that have a partner, and their partners, both ``[n]``, on the device of ``labels``.

    Example:
        >>> same_class_partners(torch.tensor([5, 6, 5, 1, 5, 1]), ignore=1)
        (tensor([0, 2, 4]), tensor([2, 4, 0]))
    """
    order = labels.sort(stable=True).indices
    _, counts = labels[order].unique_consecutive(return_counts=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    count = counts.repeat_interleave(counts)
    place = torch.arange(len(labels), device=labels.device) - first
    keep = count > 1
    if ignore is not None:
        keep &= labels[order].ne(ignore)
    return order[keep], order[first + (place + 1) % count][keep]
