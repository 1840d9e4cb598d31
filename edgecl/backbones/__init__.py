"""Backbones in the key names of their published weights; all can be cut by :func:`edgecl.splitting.split`."""

from collections.abc import Callable

from torch import nn

from edgecl.backbones.ds_cnn import DsCnn
from edgecl.backbones.mobilenet_v2 import MobileNetV2
from edgecl.backbones.resnet import ResNet, resnet18
from edgecl.backbones.resnet_cifar import ResNetCifar, resnet20, resnet32, resnet44, resnet56
from edgecl.backbones.sensors import Cnn1d, GruClassifier
from edgecl.backbones.small_cnn import SmallCnn
from edgecl.backbones.vit import VisionTransformer
from edgecl.backbones.weights import WeightsError, load_weights
from edgecl.backbones.wide_resnet import WideResNet, wrn_28_10, wrn_40_2

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCnn,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "mobilenet_v2": MobileNetV2,
    "vit": VisionTransformer,
    "ds_cnn": DsCnn,
    "cnn1d": Cnn1d,
    "gru": GruClassifier,
    "wrn_28_10": wrn_28_10,
    "wrn_40_2": wrn_40_2,
}
"""Constructors by name; each takes ``classes`` and ``generator`` by keyword."""

__all__ = [
    "BACKBONES",
    "Cnn1d",
    "DsCnn",
    "GruClassifier",
    "MobileNetV2",
    "ResNet",
    "ResNetCifar",
    "SmallCnn",
    "VisionTransformer",
    "WeightsError",
    "WideResNet",
    "load_weights",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "wrn_28_10",
    "wrn_40_2",
]
