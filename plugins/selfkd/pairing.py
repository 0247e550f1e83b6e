"""CS-KD's pairs: for each sample another one of its class."""

from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .row_labels import RowLabels
from .transfer import to_device

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
        labels = torch.as_tensor(labels, device='cpu')
        if labels.dim() != 1 or labels.is_floating_point() or not len(labels) or labels.min() < 0:
            raise ValueError(
                'labels: must be one class id (an integer of at least 0) per sample, [N] with N > 0, got '
                f'{labels.dtype}, {tuple(labels.shape)}'
            )
        self.labels = RowLabels(len(labels), labels)
        # Numbered anew: a count per id would take gigabytes where ids have ten digits.
        self._classes = torch.unique(labels, return_inverse=True)[1]
        self._members = self._classes.argsort(stable=True)  # samples, class by class
        self._count = self._classes.bincount()
        self._start = self._count.cumsum(0) - self._count

    def __len__(self) -> int:
        return len(self._classes)

    def check_labels(self, indices: Tensor, target: Tensor, *, way_out: str = '') -> None:
        """Refuses samples (anchors or partners) whose classes are not those of their rows.

        Args:
            indices: ``[B]``.
            target: class ids ``[B]`` that the batch brings.
            way_out: end of the message, in the words of the caller.

        Raises:
            ValueError: see [`RowLabels`][selfkd.row_labels.RowLabels].
        """
        self.labels.check(indices, target, way_out=way_out)

    def draw(self, indices: Union[Sequence[int], Tensor], generator: Optional[torch.Generator] = None) -> Tensor:
        """Partners of samples.

        Args:
            indices: ``[B]``, in [0, N).
            generator: of the random numbers; torch's global one by default.

        Returns:
            sample indices ``[B]``, int64.

        Raises:
            IndexError: an index outside [0, N).
        """
        indices = torch.as_tensor(indices, dtype=torch.long, device='cpu')
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(
                f'indices: must lie in [0, {len(self)}), got values from {indices.min()} to {indices.max()}'
            )
        label = self._classes[indices]
        share = torch.rand(len(label), dtype=torch.float64, generator=generator, device='cpu')
        return self._members[self._start[label] + (share * self._count[label]).long()]


def same_class_partners(
    labels: Tensor,
    objects: Optional[Tensor] = None,
    images: Optional[Tensor] = None,
    *,
    ignore: Optional[int] = None,
    generator: Optional[torch.Generator] = None,
) -> Tensor:
    """Draws pairs within a batch, for regions or tokens: for each sample another one of its class.

    The paper draws another sample of the class. In a batch of images, where several regions may show one object, what
    comes nearest to that is an object in another image: it is drawn uniformly from those of the class. Where no other
    image has the class, the object is drawn from the other ones in the image; where it is the only one, it is that
    object itself. The partner is a region of the object, drawn uniformly. A sample that has none is its own: it learns
    nothing from itself.

    Args:
        labels: class ids ``[N]``.
        objects: ids of the objects that the samples show, ``[N]``; they need to be unique within an image only. By
            default each sample is an object of its own (tokens).
        images: ids of the images (sentences) that the samples are from, ``[N]``; by default all are from one.
        ignore: this class (padding, background) has no partners.
        generator: of the random numbers, on the CPU ([`selfkd.seeds.step_generator`][]); by default torch's global
            one.

    Returns:
        the partner of each sample, ``[N]``, on the device of ``labels``, without waiting for it.

    Example:
        >>> labels = torch.tensor([5, 5, 5, 6, 1, 1])
        >>> images = torch.tensor([0, 0, 1, 0, 0, 1])
        >>> partners = same_class_partners(labels, images=images, ignore=1)
        >>> partners[[0, 1, 3, 4, 5]].tolist()  # those of the other image; class 6 has one sample only
        [2, 2, 3, 4, 5]
    """
    # No step may depend on how many samples are left, which only the device knows: all arrays are [N].
    places = torch.arange(len(labels), device=labels.device)
    objects = places if objects is None else objects
    images = torch.zeros_like(labels) if images is None else images
    order = places
    for key in (objects, images, labels):  # stable sorts: by class, therein by image, therein by object
        order = order[key[order].sort(stable=True).indices]
    label, image = labels[order], images[order]
    mine, first, regions = _runs(label, image, objects[order])

    # Of each object: which ones are of its class, and which of these are not to be drawn (its image's, or it alone).
    exists, first_or_last = regions > 0, first.clamp(max=len(labels) - 1)
    keys = exists, label[first_or_last], image[first_or_last]
    of_class, start, count = _runs(*keys[:2])
    start, count = start[of_class], count[of_class]
    of_image, barred, number = _runs(*keys)
    barred, number = barred[of_image], number[of_image]
    one_image = number == count
    barred, number = torch.where(one_image, places, barred), torch.where(one_image, 1, number)
    others = count - number

    share = torch.rand(2, len(order), dtype=torch.float64, generator=generator, device='cpu')
    share = to_device(share, labels.device)
    drawn = start[mine] + (share[0] * others[mine]).long()
    drawn = drawn + number[mine] * (drawn >= barred[mine])
    alone = others[mine] == 0
    drawn = torch.where(alone, mine, drawn)
    choices = regions[drawn] - alone.long()  # the sample itself is not to be drawn
    partner = first[drawn] + (share[1] * choices).long()
    partner = partner + (alone & (partner >= places)).long()
    found = choices > 0 if ignore is None else (choices > 0) & (label != ignore)
    return torch.empty_like(order).index_put_((order,), order[torch.where(found, partner, places)])


def _runs(*keys: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Runs of neighbours with equal keys: the run of each place, and the start and length of each run.

    All three are as long as the keys. Runs beyond the last one have the length 0.
    """
    new = torch.stack([key[1:] != key[:-1] for key in keys]).any(0)
    run = torch.cat([new.new_zeros(len(keys[0][:1])), new]).cumsum(0)
    numbers = torch.arange(len(run), device=run.device)
    start = torch.searchsorted(run, numbers)
    return run, start, torch.searchsorted(run, numbers, right=True) - start
