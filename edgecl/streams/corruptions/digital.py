"""Colour, geometry and compression: brightness, contrast, saturate, elastic, pixelate, JPEG."""

from io import BytesIO

import numpy as np
from PIL import Image

from edgecl.streams.corruptions.images import Bytes, Draws, Floats, gaussian, resampled, to_bytes


def brightness(x: Bytes, more: float, draws: Draws) -> Bytes:
    """More value, of hue, saturation and value."""
    value, saturation, place = _split(x / 255)
    return to_bytes(_joined(np.clip(value + more, 0, 1), saturation, place))


def saturate(x: Bytes, c: tuple[float, float], draws: Draws) -> Bytes:
    """Saturation times a factor plus a constant."""
    value, saturation, place = _split(x / 255)
    return to_bytes(_joined(value, np.clip(saturation * c[0] + c[1], 0, 1), place))


def _split(x: Floats) -> tuple[Floats, Floats, Floats]:
    """Value and saturation [n, H, W, 1], and where each colour lies from the strongest (0) to the weakest (1) [n, H, W, 3].

    The place of the colours is what hue says. Grey has none, and takes that of red, which is hue 0.
    """
    value, weakest = x.max(axis=3, keepdims=True), x.min(axis=3, keepdims=True)
    span = value - weakest
    saturation = np.divide(span, value, out=np.zeros_like(span), where=value > 0)
    place = np.divide(value - x, span, out=np.broadcast_to([0.0, 1.0, 1.0], x.shape).copy(), where=span > 0)
    return value, saturation, place


def _joined(value: Floats, saturation: Floats, place: Floats) -> Floats:
    return value * (1 - saturation * place)


def contrast(x: Bytes, share: float, draws: Draws) -> Bytes:
    """Each colour's distance to its mean over the image, times a share."""
    plain = x / 255
    mean = plain.mean(axis=(1, 2), keepdims=True)
    return to_bytes((plain - mean) * share + mean)


def elastic_transform(x: Bytes, c: tuple[float, float, float], draws: Draws) -> Bytes:
    """A random affine map, then random displacements: their size, their Gaussian width and the affine map's size, in image sides."""
    height, width = x.shape[1:3]
    amount, sigma, affine = (part * min(height, width) for part in c)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    # Three corners of a square around the middle, as (column, row, 1), move at random.
    middle, reach = np.array([width // 2, height // 2]), min(height, width) // 3
    corners = middle + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    shifted = corners + draws.uniform(-affine, affine, (3, 2))
    forward = np.linalg.solve(np.column_stack([corners, np.ones(3)])[None], shifted)  # [n, 3, 2]: [column row 1] @ it
    at = np.stack([columns, rows], axis=-1) - forward[:, 2, None, None]
    back = np.einsum("nhwi,nij->nhwj", at, np.linalg.inv(forward[:, :2]))
    warped = resampled(x / 255, back[..., 1], back[..., 0], "mirror")
    push = draws.uniform(-1, 1, (2, height, width))
    right, down = (gaussian(push[:, k], sigma, mode="reflect", truncate=3) * amount for k in (0, 1))
    return to_bytes(resampled(warped, rows + down, columns + right, "reflect"))


def pixelate(x: Bytes, scale: float, draws: Draws) -> Bytes:
    """Smaller by a scale and back, by boxes."""
    height, width = x.shape[1:3]
    small = (int(width * scale), int(height * scale))
    box = Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(image).resize(small, box).resize((width, height), box)) for image in x])


def jpeg_compression(x: Bytes, quality: int, draws: Draws) -> Bytes:
    """JPEG of a quality."""
    return np.stack([_jpeg(image, quality) for image in x])


def _jpeg(image: Bytes, quality: int) -> Bytes:
    with BytesIO() as file:
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))
