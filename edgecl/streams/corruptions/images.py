"""What several corruptions need: draws of one image each, bytes, and the filters of the libraries that made CIFAR-10-C."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import scipy
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]


class Draws:
    """One generator for each image, so that what an image draws does not depend on the others of its batch.

    Args:
        key: What all images share: seed, corruption, severity.
        index: Index of every image in its data set [n].
    """

    def __init__(self, key: Sequence[int], index: Sequence[int]) -> None:
        self._generators = [np.random.default_rng([*key, i]) for i in index]

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> Floats:
        """Real numbers in [low, high), [n, *shape]."""
        return np.array([g.uniform(low, high, shape) for g in self._generators])

    def normal(self, mean: float, std: float, shape: tuple[int, ...]) -> Floats:
        """Normal numbers [n, *shape]."""
        return np.array([g.normal(mean, std, shape) for g in self._generators])

    def poisson(self, mean: Floats) -> Floats:
        """Counts around ``mean`` [n, ...]."""
        return np.array([g.poisson(part) for g, part in zip(self._generators, mean, strict=True)], np.float64)

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> NDArray[np.int64]:
        """Integers from ``low`` to below ``high``, [n, *shape]."""
        return np.array([g.integers(low, high, shape) for g in self._generators])


def to_bytes(x: Floats) -> Bytes:
    """Values 0 to 1 as bytes, cut off, not rounded, as the authors' script does it."""
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


def gaussian(x: Floats, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Floats:
    """Gaussian blur of images [n, H, W] or [n, H, W, C], with scikit-image's defaults."""
    sigmas = (0.0, sigma, sigma) + (0.0,) * (x.ndim - 3)
    blurred: Floats = scipy.ndimage.gaussian_filter(x, sigmas, mode=mode, truncate=truncate)
    return blurred


@lru_cache(maxsize=256)
def zoom_matrix(size: int, factor: float) -> Floats:
    """Linear zoom into the middle of an axis, as a matrix [size, size].

    The middle ``ceil(size / factor)`` pixels become ``round`` of their number times the factor, corners on corners
    (``scipy.ndimage.zoom`` of order 1), and the middle of these is kept.
    """
    inner = math.ceil(size / factor)
    outer = round(inner * factor)
    at = np.linspace(0, inner - 1, outer)
    left = np.minimum(at.astype(np.int64), inner - 2)
    matrix = np.zeros((outer, size))
    rows, first = np.arange(outer), (size - inner) // 2
    matrix[rows, first + left] = 1 - (at - left)
    matrix[rows, first + left + 1] = at - left
    start = (outer - size) // 2
    return matrix[start : start + size]


def zoomed(x: Floats, factor: float) -> Floats:
    """Images [n, H, W, C] zoomed into their middle."""
    n, height, width, channels = x.shape
    high = (zoom_matrix(height, factor) @ x.reshape(n, height, width * channels)).reshape(x.shape)
    wide: Floats = zoom_matrix(width, factor) @ high
    return wide


def motion_kernel(radius: float, sigma: float) -> Floats:
    """Weights of the pixels behind the one that moves: a Gaussian's half from its peak on, sum 1."""
    weights = np.exp(-(np.arange(2 * math.ceil(radius) + 1.0) ** 2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum())


def moved(x: Bytes, radius: float, sigma: float, degrees: Floats) -> Bytes:
    """Motion blur of images [n, H, W, C] along one angle each [n], with whole pixels and edges that go on, as ImageMagick does it.

    Source: ImageMagick, MagickCore/effect.c, MotionBlurImage.
    """
    n, height, width, _ = x.shape
    images, angle = np.arange(n)[:, None, None], np.deg2rad(degrees)
    total = np.zeros(x.shape)
    for step, weight in enumerate(motion_kernel(radius, sigma)):
        down, right = (np.ceil(step * part(angle) - 0.5).astype(np.int64)[:, None] for part in (np.sin, np.cos))
        rows, columns = np.clip(np.arange(height) + down, 0, height - 1), np.clip(np.arange(width) + right, 0, width - 1)
        total += weight * x[images, rows[:, :, None], columns[:, None, :]]
    return np.floor(total + 0.5).astype(np.uint8)


def resampled(x: Floats, rows: Floats, columns: Floats, mode: str) -> Floats:
    """Images [n, H, W, C] with each pixel from a place of its own, [n, H, W] both, linearly between pixels."""
    planes = [
        [scipy.ndimage.map_coordinates(image[:, :, c], [down, right], order=1, mode=mode) for c in range(x.shape[3])]
        for image, down, right in zip(x, rows, columns, strict=True)
    ]
    return np.moveaxis(np.array(planes), 1, 3)


def gray(x: Floats) -> Floats:
    """Luma of images [n, H, W, 3], as [n, H, W, 1]."""
    luma: Floats = x @ np.array([[0.299], [0.587], [0.114]])
    return luma
