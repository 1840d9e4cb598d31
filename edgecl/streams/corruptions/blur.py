"""Blur: defocus, glass, motion, zoom, Gaussian."""

import numpy as np
import scipy

from edgecl.streams.corruptions.images import Bytes, Draws, Floats, gaussian, moved, to_bytes, zoomed

REACH = 4
"""Pixels from the middle to the edge of a disk's kernel: more than the largest radius and its smoothed rim."""


def disk(radius: float, rim: float) -> Floats:
    """A disk whose rim a Gaussian of three pixels smooths, sum 1 [9, 9]."""
    axis = np.arange(-REACH, REACH + 1)
    inside = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float64)
    taps = np.exp(-(np.arange(-1, 2) ** 2) / (2 * rim**2))
    for side in (0, 1):
        inside = scipy.ndimage.correlate1d(inside, taps / taps.sum(), axis=side, mode="constant")
    return np.asarray(inside / inside.sum())


def defocus_blur(x: Bytes, c: tuple[float, float], draws: Draws) -> Bytes:
    """A lens out of focus: radius and rim."""
    return to_bytes(scipy.ndimage.correlate(x / 255, disk(*c)[None, :, :, None], mode="mirror"))


def glass_blur(x: Bytes, c: tuple[float, int], draws: Draws) -> Bytes:
    """Each pixel but those at the border is taken from one of the four up and left of it, itself included: Gaussian width, times.

    The authors' line is written as a swap of two pixels, but swaps two views of one array: the pixel is overwritten, its neighbour stays.
    Their loop runs from the last pixel to the first, and neighbours lie before it, so that a pass only reads what it has not written.
    """
    sigma, times = c
    y = to_bytes(gaussian(x / 255, sigma))
    n, height, width, _ = x.shape
    images = np.arange(n)[:, None, None]
    for _ in range(times):
        up, left = np.moveaxis(draws.integers(0, 2, (2, height - 2, width - 2)), 1, 0)
        y[:, 2:, 2:] = y[images, np.arange(2, height)[:, None] - up, np.arange(2, width) - left]
    return to_bytes(gaussian(y / 255, sigma))


def motion_blur(x: Bytes, c: tuple[float, float], draws: Draws) -> Bytes:
    """A camera that moves within 45 degrees of the horizontal: radius and Gaussian width."""
    return moved(x, *c, draws.uniform(-45, 45))


def zoom_blur(x: Bytes, farthest: float, draws: Draws) -> Bytes:
    """A lens that zooms in while it sees: the mean of zooms by 1.00, 1.01, ..., and of the image itself once more."""
    plain = x / 255
    factors = np.arange(1, farthest, 0.01)
    total = plain.copy()
    for factor in factors:
        total += zoomed(plain, float(factor))
    return to_bytes(total / (len(factors) + 1))


def gaussian_blur(x: Bytes, sigma: float, draws: Draws) -> Bytes:
    """Gaussian blur of a width in pixels."""
    return to_bytes(gaussian(x / 255, sigma))
