"""The Fashion-MNIST subset that ships with the package (MIT, Zalando SE; the notice is beside the data)."""

from importlib.resources import files

import numpy as np

from edgecl.streams.dataset import Dataset

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def fashion_mnist_subset() -> Dataset:
    """2,000 training and 500 test images, grey uint8 [28, 28], 200 and 50 of each of the 10 classes.

    Source: Xiao, Rasul, Vollgraf, Fashion-MNIST, arXiv:1708.07747.

    >>> fashion_mnist_subset().x.shape
    (2000, 28, 28)
    """
    with files("edgecl.streams").joinpath("data/fashion_mnist_2000_500.npz").open("rb") as file, np.load(file) as arrays:
        return Dataset(arrays["x"], arrays["y"].astype(np.int64), arrays["xt"], arrays["yt"].astype(np.int64), CLASS_NAMES)
