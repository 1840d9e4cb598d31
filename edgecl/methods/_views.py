"""Views of images for a teacher: zoom, shift, mirror image, brightness and contrast, from integers that the device draws."""

import torch
from torch import Tensor

from edgecl_device.manifest import DrawSpec

GRAIN = 1 << 16
"""Equally likely integers of each draw."""

ZOOM, SHIFT = (0.9, 1.1), 1 / 16
"""Sides of a view by the image's; how far it may lie from the middle, by a side."""

BRIGHTNESS, CONTRAST = 0.4, (0.7, 1.3)
"""Most that is added or taken away, in standard deviations of a row; factors of the distance to its mean."""

_KINDS = 6  # zoom, two shifts, mirror, brightness, contrast


def view_draw(rows: int, count: int) -> DrawSpec:
    """What the device draws for so many views of so many rows."""
    return DrawSpec("view", (count, rows, _KINDS), GRAIN, "adapt")


def views(x: Tensor, drawn: Tensor) -> Tensor:
    """Views of each image, edges repeated, by two products a channel: [count * N, C, H, W]. MACs: count * N * C * H * W * (H + W).

    Args:
        x: float32 [N, C, H, W].
        drawn: int64 [count, N, 6], as :func:`view_draw` has it.
    """
    count, rows = drawn.shape[:2]
    n, channels, height, width = count * rows, *x.shape[1:]
    share = (drawn.reshape(n, _KINDS).to(torch.float32) + 0.5) * (1 / GRAIN)
    zoom = share[:, 0] * (ZOOM[1] - ZOOM[0]) + ZOOM[0]
    shifts = (share[:, 1:3] * 2.0 - 1.0) * SHIFT
    mirror = torch.where(share[:, 3] < 0.5, 1.0, -1.0)
    many = x.unsqueeze(0).expand(count, *x.shape).reshape(n, channels, height, width)
    across = _weights(zoom * mirror, shifts[:, 1], width)
    down = _weights(zoom, shifts[:, 0], height)
    narrow = torch.bmm(many.reshape(n, channels * height, width), across.transpose(1, 2)).reshape(n, channels, height, width)
    flat = narrow.transpose(1, 2).reshape(n, height, channels * width)
    seen = torch.bmm(down, flat).reshape(n, height, channels, width).transpose(1, 2)
    mean = seen.mean((1, 2, 3), keepdim=True)
    away = seen - mean
    deviation = (away * away).mean((1, 2, 3), keepdim=True).sqrt()
    contrast = (share[:, 5] * (CONTRAST[1] - CONTRAST[0]) + CONTRAST[0]).reshape(n, 1, 1, 1)
    brightness = ((share[:, 4] * 2.0 - 1.0) * BRIGHTNESS).reshape(n, 1, 1, 1)
    return away * contrast + mean + deviation * brightness


def _weights(zoom: Tensor, shift: Tensor, length: int) -> Tensor:
    """Bilinear weights [n, length, length] of one axis: row o says what position o of a view is made of; a negative zoom mirrors."""
    centre = torch.arange(length).to(torch.float32) + (0.5 - length / 2)
    source = centre.unsqueeze(0) * zoom.unsqueeze(1) + shift.unsqueeze(1) * length + (length / 2 - 0.5)
    source = source.clamp(0.0, length - 1.0)
    position = torch.arange(length).to(torch.float32)
    return (1.0 - (source.unsqueeze(2) - position).abs()).relu()
