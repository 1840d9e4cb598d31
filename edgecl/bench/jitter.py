"""Augmentations of source images before deployment: colour jitter, blur, grey."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

JITTER, BLUR, GREY = 0.4, 0.2, 0.1
"""Chances of each for an image."""

_AMOUNT, _HUE, _SIGMAS = 0.4, 0.1, (0.1, 2.0)
_ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def jittered(images: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Images uint8 [N, H, W, 3], some with other colours, blurred, or grey; what an image gets depends on ``seed`` and its index.

    Source: the warm-up of EcoTTA (github.com/Lily-Le/EcoTTA): ColorJitter(0.4, 0.4, 0.4, 0.1), GaussianBlur(3), grayscale.

    >>> jittered(np.full((8, 4, 4, 3), 90, np.uint8), seed=0).shape
    (8, 4, 4, 3)
    """
    made = images.copy()
    for i, pixels in enumerate(images):
        generator = np.random.default_rng((seed, i))
        image = Image.fromarray(pixels)
        if generator.random() < JITTER:
            image = _coloured(image, generator)
        if generator.random() < BLUR:
            image = image.filter(_kernel(float(generator.uniform(*_SIGMAS))))
        if generator.random() < GREY:
            image = image.convert("L").convert("RGB")
        made[i] = np.asarray(image)
    return made


def _kernel(sigma: float) -> ImageFilter.Kernel:
    """A Gaussian on 3 x 3 pixels."""
    line = np.exp(-0.5 * (np.arange(-1, 2) / sigma) ** 2)
    weights = np.outer(line, line) / line.sum() ** 2
    return ImageFilter.Kernel((3, 3), weights.reshape(-1).tolist(), scale=1)


def _coloured(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue, in random order."""
    for kind in generator.permutation(len(_ENHANCE) + 1).tolist():
        if kind < len(_ENHANCE):
            image = _ENHANCE[kind](image).enhance(float(generator.uniform(1 - _AMOUNT, 1 + _AMOUNT)))
        else:
            hue, *rest = image.convert("HSV").split()
            turned = np.asarray(hue).astype(np.int64) + round(float(generator.uniform(-_HUE, _HUE)) * 255)
            image = Image.merge("HSV", (Image.fromarray((turned % 256).astype(np.uint8)), *rest)).convert("RGB")
    return image
