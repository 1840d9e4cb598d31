"""Pooled features of a data set at several depths of a frozen MobileNetV2, computed once and kept in a file.

The benchmarks that compare many learners on one frozen trunk start from these: every learner's ``encode`` would compute the
same numbers again for every sample.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn

from edgecl import ImageU8, taps
from edgecl.backbones import BACKBONES, load_weights
from edgecl.streams import Dataset
from edgecl.streams.loaders import load_cifar10, load_cifar100, load_idx

TAPS = {
    "features.10": 64,
    "features.11.conv.1": 384,  # behind a block's depthwise convolution
    "features.13": 96,
    "features.14.conv.1": 576,
    "features.15.conv.1": 960,
    "features.16": 160,
    "features.17": 320,
    "features.18": 1280,  # what the classifier of ImageNet sees
}
"""Modules of MobileNetV2 and their channels, in the order of execution."""

SIZE = 96
"""Height and width that images are enlarged to, bilinear."""

LOADERS: dict[str, tuple[str, Callable[[Path], Dataset]]] = {
    "cifar10": ("cifar-10-batches-bin", load_cifar10),
    "cifar100": ("cifar-100-binary", load_cifar100),
    "fashion_mnist": ("FashionMNIST/raw", load_idx),
}
"""Folder within the data folder, and loader, of every set."""


class Enlarged(nn.Module):
    """uint8 images [N, 3, H, W] or grey [N, H, W] as a backbone's input float32 [N, 3, SIZE, SIZE], with ImageNet's mean and deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = ImageU8([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "CHW")

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            x = x.unsqueeze(1).expand(-1, 3, -1, -1)
        # The resize is linear and its weights sum to 1: it may come after the normalisation.
        enlarged: Tensor = nn.functional.interpolate(self.normalise(x), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        return enlarged


def backbone(weights: Path) -> nn.Module:
    """MobileNetV2 with ImageNet's weights."""
    net = BACKBONES["mobilenet_v2"](classes=1000)
    load_weights(net, weights)
    return net.eval()


def pooled_features(name: str, data: Path, weights: Path, cache: Path) -> Dataset:
    """A data set with features float32 [N, d] of all :data:`TAPS` in place of its images.

    Args:
        name: Of :data:`LOADERS`.
        data: Holds the publishers' folders.
        weights: Of MobileNetV2.
        cache: Folder in which the features are kept, by the hash of weights and taps.
    """
    folder, load = LOADERS[name]
    images = load(data / folder)
    key = hashlib.sha256(weights.read_bytes() + repr((list(TAPS), SIZE, len(images.x), len(images.x_test))).encode()).hexdigest()[:16]
    file = cache / f"{name}-{key}.npz"
    if not file.exists():
        model = nn.Sequential(Enlarged(), taps(backbone(weights), list(TAPS), torch.zeros(1, 3, SIZE, SIZE))).eval()
        cache.mkdir(parents=True, exist_ok=True)
        arrays = {part: _encoded(model, x, f"{name} {part}") for part, x in (("x", images.x), ("x_test", images.x_test))}
        np.savez(file, **arrays)
    with np.load(file) as stored:
        return Dataset(stored["x"], images.y, stored["x_test"], images.y_test, images.class_names)


def columns(cut: Sequence[str]) -> NDArray[np.int64]:
    """Columns of the features that belong to the taps ``cut``."""
    starts = dict(zip(TAPS, np.cumsum([0, *TAPS.values()]).tolist(), strict=False))
    return np.concatenate([np.arange(starts[tap], starts[tap] + TAPS[tap]) for tap in cut])


def _encoded(model: nn.Module, x: NDArray[Any], what: str) -> NDArray[np.float32]:
    with torch.no_grad():
        parts = [model(torch.tensor(x[i : i + 64])).numpy() for i in track(range(0, len(x), 64), what)]
    return np.concatenate(parts)
