"""Noise: Gaussian, shot, impulse, speckle."""

import numpy as np

from edgecl.streams.corruptions.images import Bytes, Draws, to_bytes


def gaussian_noise(x: Bytes, std: float, draws: Draws) -> Bytes:
    """Normal noise on each value."""
    return to_bytes(x / 255 + draws.normal(0, std, x.shape[1:]))


def shot_noise(x: Bytes, rate: float, draws: Draws) -> Bytes:
    """Counts of photons, ``rate`` of them on white."""
    return to_bytes(draws.poisson(x / 255 * rate) / rate)


def impulse_noise(x: Bytes, amount: float, draws: Draws) -> Bytes:
    """A share of the values becomes 0 or 1, as often."""
    hit, white = np.moveaxis(draws.uniform(0, 1, (2, *x.shape[1:])), 1, 0)
    return to_bytes(np.where(hit < amount, white < 0.5, x / 255))


def speckle_noise(x: Bytes, std: float, draws: Draws) -> Bytes:
    """Normal noise in proportion to each value."""
    return to_bytes(x / 255 * (1 + draws.normal(0, std, x.shape[1:])))
