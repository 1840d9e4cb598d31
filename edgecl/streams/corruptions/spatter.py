"""Spatter: drops of water, or mud."""

import numpy as np
import scipy
from numpy.typing import NDArray

from edgecl.streams.corruptions.images import Bytes, Draws, Floats, gaussian, to_bytes

WATER = np.array([175, 238, 238]) / 255
"""Pale turquoise."""

MUD = np.array([63, 42, 20]) / 255
"""Brown."""

WEAK, STRONG = 50, 150
"""Gradients of an edge that goes on, and of one that begins."""

FARTHEST = 20
"""Distance to an edge, in pixels, beyond which a drop is flat."""

RELIEF = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
"""Light from one corner."""

SOBEL = np.outer([-1.0, 0.0, 1.0], [1.0, 2.0, 1.0])
"""Gradient down; transposed, to the right."""

EIGHT = np.zeros((3, 3, 3), bool)
EIGHT[1] = True
"""Neighbours within an image, not across images."""


def spatter(x: Bytes, c: tuple[float, float, float, float, float, bool], draws: Draws) -> Bytes:
    """Drops where a normal layer is high: its mean, width, smoothness and threshold, strength or blur of the drops, whether of mud."""
    mean, std, sigma, least, strength, mud = c
    layer = gaussian(draws.normal(mean, std, x.shape[1:3]), sigma)
    layer[layer < least] = 0
    plain = x / 255
    if mud:
        cover = gaussian((layer > least).astype(np.float64), strength)
        cover[cover < 0.8] = 0
        return to_bytes(plain * (1 - cover[..., None]) + cover[..., None] * MUD)
    drops = to_bytes(layer)
    light = drops * _relief(drops)
    brightest = light.max(axis=(1, 2), keepdims=True)
    # Without a drop the authors' script divides by zero; here the image stays as it is.
    share = strength * np.divide(light, brightest, out=np.zeros_like(light), where=brightest > 0)
    return to_bytes(plain + share[..., None] * WATER)


def _relief(drops: Bytes) -> Floats:
    """Light on drops [n, H, W], from the distance to their edges."""
    far = np.stack([scipy.ndimage.distance_transform_edt(~edge) if edge.any() else np.full(edge.shape, FARTHEST) for edge in edges(drops)])
    depth = scipy.ndimage.uniform_filter(np.minimum(far, FARTHEST), (0, 3, 3), mode="mirror").astype(np.uint8)
    level = np.stack([equalized(image) for image in depth]).astype(np.float64)
    lit = np.clip(scipy.ndimage.correlate(level, RELIEF[None].astype(np.float64), mode="mirror"), 0, 255)
    return np.asarray(np.rint(scipy.ndimage.uniform_filter(lit, (0, 3, 3), mode="mirror")))


def edges(x: Bytes) -> NDArray[np.bool_]:
    """Edges of images [n, H, W]: ridges of the gradient that are strong somewhere (Canny's, with the sum of both parts as strength)."""
    wide = x.astype(np.float64)
    down, right = (scipy.ndimage.correlate(wide, part[None], mode="nearest") for part in (SOBEL, SOBEL.T))
    strength = np.pad(np.abs(down) + np.abs(right), ((0, 0), (1, 1), (1, 1)))

    def beside(rows: int, columns: int) -> Floats:
        return strength[:, 1 + rows : 1 + rows + x.shape[1], 1 + columns : 1 + columns + x.shape[2]]

    here, tangent = beside(0, 0), np.tan(np.pi / 8)
    flat, steep = np.abs(down) < tangent * np.abs(right), np.abs(right) < tangent * np.abs(down)
    falling = down * right >= 0
    ridge = np.select(
        [flat, steep, falling],
        [
            (here > beside(0, -1)) & (here >= beside(0, 1)),
            (here > beside(-1, 0)) & (here >= beside(1, 0)),
            (here > beside(-1, -1)) & (here > beside(1, 1)),
        ],
        (here > beside(-1, 1)) & (here > beside(1, -1)),
    )
    parts, _ = scipy.ndimage.label(ridge & (here > WEAK), EIGHT)
    begun = np.unique(parts[ridge & (here > STRONG)])
    return np.isin(parts, begun[begun > 0])


def equalized(x: Bytes) -> Bytes:
    """An image [H, W] whose levels are spread by their ranks; the lowest becomes 0."""
    counts = np.bincount(x.ravel(), minlength=256)
    lowest = int(np.flatnonzero(counts)[0])
    rest = x.size - counts[lowest]
    if not rest:
        return x
    below = np.cumsum(counts) - counts[lowest]
    return np.asarray(np.rint(np.maximum(below, 0) * (255 / rest)).astype(np.uint8)[x])
