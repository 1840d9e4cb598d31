"""A small form of the comparisons that needs no download: for a first look, and for tests."""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgecl.backbones.resnet_cifar import ResNetCifar
from edgecl.preprocess import ImageU8
from edgecl.pretraining import Recipe, train
from edgecl.streams import Dataset, fashion_mnist_subset

GREY = ImageU8([0.2860] * 3, [0.3530] * 3, "CHW")
"""Fashion-MNIST's mean and standard deviation, three times."""


@functools.cache
def colour_fashion() -> Dataset:
    """The Fashion-MNIST subset as colour images uint8 [N, 3, 28, 28] whose channels are alike."""
    data = fashion_mnist_subset()
    return Dataset(_coloured(data.x), data.y, _coloured(data.x_test), data.y_test, data.class_names)


@functools.cache
def small_network(epochs: int = 4) -> nn.Module:
    """A ResNet of 8 layers, trained on it."""
    generator = torch.Generator().manual_seed(0)
    net, data = ResNetCifar(1, generator=generator), colour_fashion()
    train(net, data.x, data.y, preprocess=GREY, recipe=Recipe(epochs=epochs, batch=64), generator=generator)
    return net


def _coloured(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.repeat(images.reshape(-1, 1, 28, 28), 3, 1))
