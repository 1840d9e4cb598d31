"""Backbones in the key names of their published weights; all can be cut by :func:`edgecl.splitting.split`."""

from collections.abc import Callable

from torch import nn

from edgecl.backbones.mobilenet_v2 import MobileNetV2
from edgecl.backbones.resnet_cifar import ResNetCifar, resnet20, resnet32, resnet44, resnet56
from edgecl.backbones.small_cnn import SmallCnn
from edgecl.backbones.weights import WeightsError, load_weights

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCnn,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "mobilenet_v2": MobileNetV2,
}
"""Constructors by name; each takes ``classes`` and ``generator`` by keyword."""

__all__ = [
    "BACKBONES",
    "MobileNetV2",
    "ResNetCifar",
    "SmallCnn",
    "WeightsError",
    "load_weights",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
]
