"""Corruptions by name and severity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl.streams.corruptions import blur, digital, noise, spatter, weather
from edgecl.streams.corruptions.images import Bytes, Draws
from edgecl_device.checks import as_int, short
from edgecl_device.errors import InputError

SEVERITIES = 5

SMALLEST = 8
"""Side of the smallest image, one block of JPEG."""

TOGETHER = 256
"""Images that are corrupted at once: of 32 pixels, what they need beside themselves stays below 50 MB."""


@dataclass(frozen=True)
class Corruption:
    """A corruption.

    Attributes:
        apply: From images uint8 [n, H, W, 3], the constants of a severity and the images' draws to corrupted images.
        constants: Those of severity 1 to 5; the function says what they are.
    """

    apply: Callable[[Bytes, Any, Draws], Bytes]
    constants: Sequence[Any]


COMMON: dict[str, Corruption] = {
    "gaussian_noise": Corruption(noise.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(noise.shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(noise.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(blur.defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": Corruption(blur.glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": Corruption(blur.motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Corruption(blur.zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": Corruption(
        weather.snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(weather.frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Corruption(weather.fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption(digital.brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(digital.contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        digital.elastic_transform, ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    ),
    "pixelate": Corruption(digital.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(digital.jpeg_compression, (80, 65, 58, 50, 40)),
}

EXTRA: dict[str, Corruption] = {
    "speckle_noise": Corruption(noise.speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": Corruption(blur.gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": Corruption(
        spatter.spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
    ),
    "saturate": Corruption(digital.saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}

CORRUPTIONS: tuple[str, ...] = tuple(COMMON)
"""The 15 common corruptions, in the order in which they are run."""

EXTRA_CORRUPTIONS: tuple[str, ...] = tuple(EXTRA)
"""The four that are held out, to choose hyperparameters on."""

_ALL = COMMON | EXTRA


def corrupt(x: Bytes, corruption: str, severity: int, *, seed: int = 0, index: NDArray[np.integer[Any]] | None = None) -> Bytes:
    """Corrupt images as CIFAR-10-C does: the same constants and operations, own draws.

    What an image draws is decided by ``seed``, the corruption, the severity and the image's index alone: not by its batch. Not equal
    to the bit to the authors' files are all that draw; frost, whose photographs are textures drawn here; and elastic, motion blur, snow and
    spatter, whose originals use OpenCV's and ImageMagick's arithmetic.

    Args:
        x: Images uint8 [N, H, W, 3], sides of 8 pixels at least. The constants were chosen for 32.
        corruption: One of :data:`CORRUPTIONS` or :data:`EXTRA_CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of the draws.
        index: Index of every image in its data set [N]; 0, 1, ... by default.

    Returns:
        Corrupted images uint8 [N, H, W, 3].

    Raises:
        InputError: when the images, the corruption, the severity, the seed or the index are others.

    Source: Hendrycks & Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019; constants of
    the authors' ImageNet-C/create_c/make_cifar_c.py.

    >>> x = np.full((2, 32, 32, 3), 100, np.uint8)
    >>> corrupt(x, "brightness", 5)[0, 0, 0].tolist()
    [176, 176, 176]
    >>> bool((corrupt(x, "fog", 3)[1] == corrupt(x[1:], "fog", 3, index=np.array([1]))[0]).all())
    True
    """
    _check_images(x)
    check_corruption("corruption", corruption)
    check_severity("severity", severity)
    if as_int("seed", seed) < 0:
        raise InputError(f"seed: must be at least 0, got {seed}; pass 0")
    rows = np.arange(len(x)) if index is None else np.asarray(index)
    if rows.shape != (len(x),) or rows.dtype.kind not in "iu" or (len(x) and rows.min() < 0):
        got = f"{rows.dtype} {list(rows.shape)}" + (f" from {rows.min()}" if rows.size and rows.dtype.kind in "iu" else "")
        raise InputError(f"index: must be integers from 0, [{len(x)}], one for each image, got {got}; leave it out for 0, 1, ...")
    chosen, key = _ALL[corruption], (int(seed), list(_ALL).index(corruption), int(severity))
    done = [np.empty_like(x[:0])]
    for first in range(0, len(x), TOGETHER):
        part = slice(first, first + TOGETHER)
        done.append(chosen.apply(x[part], chosen.constants[severity - 1], Draws(key, rows[part].tolist())))
    return np.concatenate(done)


def _check_images(x: Any) -> None:
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or min(x.shape[1:3]) < SMALLEST:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        raise InputError(f"x: must be uint8 [N, H, W, 3] with sides of at least {SMALLEST}, got {got}; transpose, repeat or resize it")


def check_corruption(name: str, corruption: Any) -> None:
    """Refuse what is no corruption's name."""
    if not isinstance(corruption, str) or corruption not in _ALL:
        raise InputError(f"{name}: must be one of {', '.join(_ALL)}, got {short(corruption)}; name one of them")


def check_severity(name: str, severity: Any) -> None:
    """Refuse what is no severity."""
    if not 1 <= as_int(name, severity) <= SEVERITIES:
        raise InputError(f"{name}: must be from 1 to {SEVERITIES}, got {severity}; pass 5 for the published setting")
