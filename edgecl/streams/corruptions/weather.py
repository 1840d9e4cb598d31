"""Weather: snow, frost, fog."""

import numpy as np

from edgecl.streams.corruptions.images import Bytes, Draws, Floats, gray, moved, to_bytes, zoomed
from edgecl.streams.corruptions.textures import TEXTURES, frost_texture

WIBBLE = 100.0
"""The first displacement of a plasma; only the ratio of displacements matters."""


def snow(x: Bytes, c: tuple[float, float, float, float, float, float, float], draws: Draws) -> Bytes:
    """Falling flakes: mean, width, zoom and threshold of a normal layer, radius and width of its motion, share of the image's colours."""
    mean, std, zoom, least, radius, sigma, share = c
    layer = zoomed(draws.normal(mean, std, (*x.shape[1:3], 1)), zoom)
    layer[layer < least] = 0
    flakes = moved(to_bytes(layer), radius, sigma, draws.uniform(-135, -45)) / 255
    plain = x / 255
    paler = share * plain + (1 - share) * np.maximum(plain, gray(plain) * 1.5 + 0.5)
    return to_bytes(paler + flakes + np.rot90(flakes, 2, axes=(1, 2)))


def frost(x: Bytes, c: tuple[float, float], draws: Draws) -> Bytes:
    """Ice on the lens: shares of the image and of a piece of a texture."""
    height, width = x.shape[1:3]
    textures = np.stack([frost_texture(k, max(height, width)) for k in range(TEXTURES)])
    which = draws.integers(0, TEXTURES)
    down, right = draws.integers(0, textures.shape[1], (2,)).T
    rows, columns = (down[:, None] + np.arange(height)) % textures.shape[1], (right[:, None] + np.arange(width)) % textures.shape[2]
    ice = textures[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return to_bytes(c[0] * (x / 255) + c[1] * ice)


def fog(x: Bytes, c: tuple[float, float], draws: Draws) -> Bytes:
    """Clouds of a plasma fractal: amount, and how fast their detail decays."""
    amount, decay = c
    height, width = x.shape[1:3]
    size = 1 << (max(height, width) - 1).bit_length()
    clouds = plasma(draws.uniform(-1, 1, (size * size - 1,)), size, decay)[:, :height, :width, None]
    plain = x / 255
    brightest = plain.max(axis=(1, 2, 3), keepdims=True)
    return to_bytes((plain + amount * clouds) * brightest / (brightest + amount))


def plasma(noise: Floats, size: int, decay: float) -> Floats:
    """Height maps 0 to 1 by diamonds and squares, on a torus.

    A displacement is the level's height squared times a draw, as in the authors' script, so that ``decay`` acts squared.

    Args:
        noise: Draws in [-1, 1) in the order of their use [n, size * size - 1].
        size: Side, a power of two.
        decay: Each level's height is the last one's over it.
    """
    n = len(noise)
    heights = np.zeros((n, size, size))
    used, step, wibble = 0, size, WIBBLE

    def displaced(total: Floats) -> Floats:
        nonlocal used
        first, used = used, used + total[0].size
        return total / 4 + wibble**2 * noise[:, first:used].reshape(total.shape)

    while step > 1:
        half = step // 2
        corners = heights[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, half::step] = displaced(pairs + np.roll(pairs, -1, axis=2))
        middles = heights[:, half::step, half::step]
        for axis, place in ((1, np.s_[:, ::step, half::step]), (2, np.s_[:, half::step, ::step])):
            between = corners + np.roll(corners, -1, axis=3 - axis)
            heights[place] = displaced(between + middles + np.roll(middles, 1, axis=axis))
        step, wibble = half, wibble / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return np.asarray(heights / heights.max(axis=(1, 2), keepdims=True))
