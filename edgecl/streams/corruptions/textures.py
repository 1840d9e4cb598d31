"""Textures of frost, drawn instead of photographed."""

from functools import lru_cache

import numpy as np
import scipy

from edgecl.streams.corruptions.images import Floats

TEXTURES = 5
"""As many as the authors' script chooses among."""

SEED = 20190328
"""Of the textures, which are the same whatever the seed of the images, as photographs are."""

CRYSTALS = 60
"""In a texture of 128 pixels."""


@lru_cache(maxsize=32)
def frost_texture(number: int, smallest: int) -> Floats:
    """A texture of ice that goes on over its edges, values 0 to 1.

    Crystals are needles with side needles at 60 degrees, which shorten towards the tip; a haze of several scales lies between them.
    Brightness, contrast and tint were chosen such that frost is about as hard as snow for a ResNet-20 at severity 5.

    Args:
        number: Which one.
        smallest: Least side in pixels.

    Returns:
        Colours [S, S, 3]; S is 128 or the next power of two that is large enough.
    """
    generator = np.random.default_rng([SEED, number])
    size = max(128, 1 << (2 * smallest - 1).bit_length())
    haze = np.zeros((size, size))
    for sigma in (2.0, 5.0, 12.0):
        cloud = scipy.ndimage.gaussian_filter(generator.normal(size=(size, size)), sigma, mode="wrap")
        haze += sigma**0.5 * cloud / cloud.std()
    haze = (haze - haze.mean()) / haze.std()
    ice = np.zeros((size, size))
    for _ in range(CRYSTALS * (size // 128) ** 2):
        rows, columns, light = _crystal(generator, size)
        np.add.at(ice, (rows % size, columns % size), light)
    ice = scipy.ndimage.gaussian_filter(ice, 0.6, mode="wrap")
    value = np.clip(0.45 + 0.15 * haze + 0.5 * (1 - np.exp(-1.5 * ice)), 0, 1)[:, :, None]
    # From the blue of shadowed ice to white.
    return np.asarray(value * (1 - (1 - value) * np.array([0.9, 0.4, 0.0])))


def _crystal(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and light of a crystal's points."""
    start, angle = generator.uniform(0, size, 2), generator.uniform(0, 2 * np.pi)
    length, bright = generator.uniform(15, 50), generator.uniform(0.3, 1.0)
    along = np.arange(0, length, 0.5)
    points, lights = [start + along[:, None] * [np.sin(angle), np.cos(angle)]], [bright * np.ones(len(along))]
    for at in np.arange(3, length, 3.0):
        for side in (-np.pi / 3, np.pi / 3):
            branch = np.arange(0, 0.4 * (length - at), 0.5)
            root = start + at * np.array([np.sin(angle), np.cos(angle)])
            points.append(root + branch[:, None] * [np.sin(angle + side), np.cos(angle + side)])
            lights.append(bright * np.linspace(0.8, 0.2, len(branch)))
    rows, columns = np.rint(np.concatenate(points)).astype(np.int64).T
    return rows, columns, np.concatenate(lights)
