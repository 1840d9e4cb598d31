"""Augmentation of stored feature maps, as REMIND has it: random resized crop and mixup, from integers that the device draws.

A graph draws no random number, and a logarithm or a root need not have the same bits in two languages. So the distributions are frozen
tables of equally likely entries in the graph, and what the device draws is places in them: bounded integers only
(``docs/generator.md``).

Source: Hayes et al. 2020, "REMIND Your Neural Network to Prevent Catastrophic Forgetting" (area of 2/7 to 1 of the map, aspect of 3/4 to
4/3, Beta(0.1, 0.1) for pairs of stored rows); Zhang et al. 2018, "mixup". Deviations: tables of 1,024 entries in place of the
distributions themselves; where ten draws of a box do not fit, the whole map is taken whatever its own aspect.
"""

import math

import numpy as np
import torch
from torch import Tensor

ENTRIES = 1024
"""Equally likely entries of a table: what the device draws below."""

PLACES = 1 << 16
"""Resolution of a box's place; it is drawn before the box's size is known."""

MOST_SIDE = 255
"""Longest side of a map; products of a side and a place are then exact in float32."""

_SCALE, _ASPECT, _TRIES, _GRID = (2 / 7, 1.0), (3 / 4, 4 / 3), 10, 1000


def crop_sizes(height: int, width: int) -> Tensor:
    """Heights and widths of random boxes in a map, float32 [:data:`ENTRIES`, 2], each row equally likely.

    Area uniform in 2/7 to 1 of the map, aspect log-uniform in 3/4 to 4/3, both sides rounded; boxes that do not fit are drawn again, ten
    times at most. The probabilities are counted on a grid of area and aspect.

    >>> sorted(set(map(tuple, crop_sizes(2, 2).int().tolist())))
    [(1, 1), (1, 2), (2, 1), (2, 2)]
    """
    middle = (np.arange(_GRID) + 0.5) / _GRID
    area = (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * middle)[:, None] * height * width
    low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    aspect = np.exp(low + (high - low) * middle)[None]
    boxes = np.stack([np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))], 2).reshape(-1, 2).astype(int)
    fits = (boxes >= 1).all(1) & (boxes <= (height, width)).all(1)
    chance = np.zeros((height + 1, width + 1))
    np.add.at(chance, tuple(boxes[fits].T), 1 / len(boxes))
    missed = 1 - float(fits.mean())
    chance *= sum(missed**i for i in range(_TRIES))
    chance[height, width] += missed**_TRIES
    places = np.searchsorted(np.cumsum(chance.ravel()), (np.arange(ENTRIES) + 0.5) / ENTRIES)
    return torch.from_numpy(np.stack(np.unravel_index(places, chance.shape), 1).astype(np.float32))


def beta_quantiles(alpha: float) -> Tensor:
    """Quantiles of Beta(alpha, alpha) in the middle of :data:`ENTRIES` equal shares, float32 [:data:`ENTRIES`], 0 < alpha <= 1.

    The substitution ``u = x ** alpha`` takes the pole of the density at zero away; the upper half mirrors the lower one.

    >>> beta_quantiles(1.0)[[0, 511, 512]].tolist()  # the uniform distribution
    [0.00048828125, 0.49951171875, 0.50048828125]
    """
    u = np.linspace(0.0, 0.5**alpha, 1 << 16)
    density = (1 - u ** (1 / alpha)) ** (alpha - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    shares = (np.arange(ENTRIES // 2) + 0.5) / (ENTRIES // 2)
    lower = np.interp(shares * mass[-1], mass, u) ** (1 / alpha)
    return torch.from_numpy(np.concatenate([lower, 1 - lower[::-1]]).astype(np.float32))


def crop(x: Tensor, size: Tensor, place: Tensor, sizes: Tensor) -> Tensor:
    """A box of each map, back at the map's size by bilinear interpolation (half-pixel centres, as ``torch`` without aligned corners).

    Two small products: the columns' interpolation matrix, then the rows'. MACs: N * C * H * W * (H + W).

    Args:
        x: float32 [N, C, H, W].
        size: int64 [N], places in ``sizes``.
        place: int64 [N, 2], the box's top and left edge: see :func:`interpolation`.
        sizes: See :func:`crop_sizes`.
    """
    n, channels, height, width = x.shape
    box = sizes.index_select(0, size)
    rows = interpolation(place[:, 0], box[:, 0], height)
    columns = interpolation(place[:, 1], box[:, 1], width)
    narrow = torch.bmm(x.reshape(n, channels * height, width), columns.transpose(1, 2)).reshape(x.shape)
    flat = narrow.transpose(1, 2).reshape(n, height, channels * width)
    return torch.bmm(rows, flat).reshape(n, height, channels, width).transpose(1, 2)


def interpolation(place: Tensor, size: Tensor, length: int) -> Tensor:
    """Weights [N, length, length] that stretch a box of one axis over all of it: row o says what output o is made of.

    Args:
        place: int64 [N], in [0, :data:`PLACES`): the box starts at ``floor(place * (length + 1 - size) / PLACES)``.
        size: float32 [N], whole numbers of 1 to ``length``.
        length: Positions of the axis.
    """
    start = (place.to(torch.float32) * (length + 1.0 - size) * (1.0 / PLACES)).floor()
    centre = torch.arange(length).to(torch.float32) + 0.5
    source = ((size / length).unsqueeze(1) * centre - 0.5).clamp_min(0.0)
    source = torch.minimum(source, (size - 1.0).unsqueeze(1))  # beyond the last centre its own value holds
    position = torch.arange(length).to(torch.float32) - start.unsqueeze(1)
    return (1.0 - (source.unsqueeze(2) - position.unsqueeze(1)).abs()).relu()


def mix(x: Tensor, share: Tensor, rows: int) -> Tensor:
    """The first ``rows`` maps [2 rows, ...], each mixed with the one ``rows`` behind it: ``share * a + (1 - share) * b``.

    Args:
        x: float32 [2 rows, ...].
        share: float32 [rows].
        rows: Pairs.
    """
    share = share.reshape(-1, *[1] * (x.dim() - 1))
    return x[:rows] * share + x[rows:] * (1.0 - share)
