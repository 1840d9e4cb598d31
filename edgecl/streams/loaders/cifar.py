"""CIFAR-10 and CIFAR-100 in their publisher's binary version: fixed-length records, label bytes first."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgecl.streams.dataset import Dataset
from edgecl.streams.loaders._files import DAMAGED, folder_of, read_bytes
from edgecl_device.errors import InputError

SHAPE = (3, 32, 32)
"""Red, green and blue planes of 32 rows of 32 pixels."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy", "bridge", "bus",
    "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch",
    "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo",
    "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse",
    "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy",
    "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television",
    "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip
"""The fine labels, in the order of the publisher's ``fine_label_names.txt``."""

CIFAR100_SUPERCLASSES = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
    "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things", "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates", "people", "reptiles", "small_mammals", "trees",
    "vehicles_1", "vehicles_2",
)  # fmt: skip
"""The coarse labels, in the order of the publisher's ``coarse_label_names.txt``."""


def load_cifar10(folder: str | Path) -> Dataset:
    """Load ``data_batch_1.bin`` to ``data_batch_5.bin``, those that are there, and ``test_batch.bin``.

    A record is the label and 3,072 pixels. A file may hold any whole number of records.

    Args:
        folder: Holds the files, ``cifar-10-batches-bin`` in the archive.

    Returns:
        Images uint8 [N, 3, 32, 32], batch by batch, and labels.

    Raises:
        InputError: when a file is missing, is no whole number of records, or has a label above 9.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; the data set's page, "Binary version".

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("data_batch_1.bin", "test_batch.bin"):
    ...         _ = (Path(folder) / name).write_bytes(bytes([6]) + bytes(3072))
    ...     data = load_cifar10(folder)
    >>> data.x.shape, data.class_names[data.y[0]]
    ((1, 3, 32, 32), 'frog')
    """
    place = folder_of(folder)
    batches = [path for i in range(1, 6) if (path := place / f"data_batch_{i}.bin").exists()]
    if not batches:
        raise InputError(f"{place}: must have data_batch_1.bin to data_batch_5.bin or some of them, got none; give the binary version")
    parts = [_records(path, (len(CIFAR10_CLASSES),)) for path in batches]
    x, y = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    x_test, y_test = _records(place / "test_batch.bin", (len(CIFAR10_CLASSES),))
    return Dataset(x, y[:, 0], x_test, y_test[:, 0], CIFAR10_CLASSES)


def load_cifar100(folder: str | Path) -> Dataset:
    """Load ``train.bin`` and ``test.bin``: fine labels as classes, coarse labels as groups.

    A record is the coarse label, the fine label and 3,072 pixels. A file may hold any whole number of records.

    Args:
        folder: Holds the files, ``cifar-100-binary`` in the archive.

    Returns:
        Images uint8 [N, 3, 32, 32], labels of the 100 classes, and groups: the 20 superclasses.

    Raises:
        InputError: when a file is missing, is no whole number of records, or has a fine label above 99 or a coarse one above 19.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; the data set's page, "Binary version".

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("train.bin", "test.bin"):
    ...         _ = (Path(folder) / name).write_bytes(bytes([1, 73]) + bytes(3072))
    ...     data = load_cifar100(folder)
    >>> data.class_names[data.y[0]], data.group_names[data.group[0]]
    ('shark', 'fish')
    """
    place = folder_of(folder)
    limits = (len(CIFAR100_SUPERCLASSES), len(CIFAR100_CLASSES))
    (x, labels), (x_test, labels_test) = (_records(place / name, limits) for name in ("train.bin", "test.bin"))
    return Dataset(x, labels[:, 1], x_test, labels_test[:, 1], CIFAR100_CLASSES, labels[:, 0], labels_test[:, 0], CIFAR100_SUPERCLASSES)


def _records(path: Path, limits: tuple[int, ...]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [N, 3, 32, 32] and label columns [N, len(limits)]; column j is below ``limits[j]``."""
    content = read_bytes(path)
    size = len(limits) + int(np.prod(SHAPE))
    if not content or len(content) % size:
        raise InputError(f"{path}: must be a whole number of records of {size} bytes, got {len(content)} bytes; {DAMAGED}")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = records[:, : len(limits)].astype(np.int64)
    for column, limit in enumerate(limits):
        if (wrong := np.flatnonzero(labels[:, column] >= limit)).size:
            row = int(wrong[0])
            raise InputError(
                f"{path}: byte {column} of every record must be a label in 0..{limit - 1}, got {labels[row, column]} in record {row};"
                " give the right set's binary version"
            )
    return np.ascontiguousarray(records[:, len(limits) :]).reshape(-1, *SHAPE), labels
