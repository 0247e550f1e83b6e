"""timm's own loaders and losses, as its train.py makes them."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from selfkd_torch import CSKD, PSKD

pytest.importorskip('timm')
from PIL import Image  # noqa: E402
from timm.data import FastCollateMixup, create_loader  # noqa: E402
from timm.loss import LabelSmoothingCrossEntropy  # noqa: E402

N, CLASSES, SHADES = 24, 4, 10


class Shades(Dataset):
    """Images of one colour each, which says which they are, whatever is cut out of them."""

    transform = None

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.transform(Image.new('RGB', (16, 16), (SHADES * index,) * 3)), index % CLASSES


class Scheduled(Shades):
    """timm takes the transform away and gives it the image: (image, label), of a tuple that its sampler draws."""

    def __getitem__(self, index):
        return Image.new('RGB', (16, 16), (SHADES * index,) * 3), index % CLASSES


def loader_of(data=None, **options):
    """Of images in [0, 1]."""
    settings = dict(batch_size=6, is_training=True, color_jitter=0, num_workers=0, device=torch.device('cpu'))
    return create_loader(data or Shades(), 8, mean=(0, 0, 0), std=(1, 1, 1), **{**settings, **options})


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES))


@pytest.mark.parametrize('scheduled', [False, True])
@pytest.mark.parametrize('prefetcher', [True, False])
@pytest.mark.parametrize('workers', [0, 2])
def test_rows_are_those_of_the_samples(scheduled, prefetcher, workers):
    """The prefetcher holds a batch back; of scheduled sizes the sampler draws (sample, size)."""
    options = dict(use_prefetcher=prefetcher, num_workers=workers)
    if scheduled:
        options.update(data=Scheduled(), input_size_choices=[8, 12], batch_size_choices=[6, 3])
    model, criterion = network(), LabelSmoothingCrossEntropy()
    loader = loader_of(**options)
    pskd = PSKD(loader, max_epochs=3)
    assert len(pskd.batches()) == len(loader)
    losses, sides = [], set()
    for epoch in range(2):
        pskd.batches().batch_sampler.set_epoch(epoch) if scheduled else None
        for images, target in pskd.batches():
            with pskd.tap(criterion):
                loss = criterion(model(images), target)
            assert pskd._rows.tolist() == (images[:, 0, 0, 0] * 255 / SHADES).round().tolist()
            losses.append(loss.item() - criterion(model(images), target).item())
            sides.add(images.shape[-1])
    half = len(losses) // 2
    assert losses[:half] == [0] * half
    assert any(losses[half:])
    assert sides == ({8, 12} if scheduled else {8})


def test_partners_of_scheduled_batches_have_their_size():
    options = dict(use_prefetcher=False, input_size_choices=[8, 12], batch_size_choices=[6, 6])
    cskd = CSKD(loader_of(Scheduled(), **options), network(), labels=torch.arange(N) % CLASSES)
    for images, target in cskd.batches():
        assert cskd._partners[0].shape == images.shape
        assert torch.equal(cskd._partners[1], target)
        cskd.loss(cskd.model(images), target).backward()


def test_what_does_not_work_names_the_flag():
    with pytest.raises(ValueError, match=r"MultiEpochsDataLoader.*leave out timm's --use-multi-epochs-loader, or use"):
        PSKD(loader_of(use_multi_epochs_loader=True), max_epochs=3)
    with pytest.raises(ValueError, match='CSKD: .* normalizes batches after they are collated, .* use --no-prefetcher'):
        CSKD(loader_of(), network(), labels=torch.arange(N) % CLASSES)


def test_what_the_script_sets_on_the_loader_arrives_there():
    """It switches mixing off for the last epochs."""
    collate = FastCollateMixup(mixup_alpha=1.0, num_classes=CLASSES)
    model = network()
    pskd = PSKD(loader_of(collate_fn=collate), max_epochs=3, teacher='snapshot', model=model)
    pskd.batches().mixup_enabled = False
    assert not collate.mixup_enabled
    pskd.batches().seed = 3  # its own stays its own
    assert not hasattr(pskd.batches().loader, 'seed')
