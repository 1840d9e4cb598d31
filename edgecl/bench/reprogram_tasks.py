"""The tasks of ``edgecl bench reprogram``: images of one form from four sources, uint8 [N, 3, 32, 32], ten classes at most each."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgecl.runs.files import array_bytes
from edgecl.streams import Dataset, fashion_mnist_subset
from edgecl.streams.loaders import load_cifar10, load_cifar100, load_idx, load_wavs

Images = NDArray[np.uint8]
SIDE = 32
CLASSES = 10
LOUDEST, SILENCE = 8.0, -16.0
"""Log-mel energies that become 255 and 0."""


@dataclass(frozen=True, eq=False)
class Task:
    """A task with training and test images, classes 0 to K - 1.

    Attributes:
        name: Its name.
        source: Where it is from.
        x: uint8 [N, 3, 32, 32].
        y: int64 [N].
        x_test: As ``x``.
        y_test: As ``y``.
        class_names: Names of its classes.
    """

    name: str
    source: str
    x: Images
    y: NDArray[np.int64]
    x_test: Images
    y_test: NDArray[np.int64]
    class_names: tuple[str, ...]

    def sha256(self) -> str:
        """SHA-256 over its images and labels."""
        digest = hashlib.sha256()
        for array in (self.x, self.y, self.x_test, self.y_test):
            digest.update(array_bytes(array))
        return digest.hexdigest()


def coloured(images: Images) -> Images:
    """Grey images [N, H, W] of up to 32 pixels a side, in the middle of black ones of three equal channels."""
    n, height, width = images.shape
    framed = np.zeros((n, SIDE, SIDE), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    framed[:, top : top + height, left : left + width] = images
    return np.repeat(framed[:, None], 3, 1)


def pictures(spectrograms: NDArray[np.float32]) -> Images:
    """Log-mel spectrograms [N, 1, frames, mels] as images: the nearest 32 frames and 32 bands, a grey value for each energy."""
    _, _, frames, mels = spectrograms.shape
    rows, columns = (np.linspace(0, size - 1, SIDE).round().astype(int) for size in (frames, mels))
    chosen = spectrograms[:, 0][:, rows][:, :, columns]
    return coloured(np.clip((chosen - SILENCE) / (LOUDEST - SILENCE) * 255, 0, 255).astype(np.uint8))


def cut(data: Dataset, source: str, name: str, classes: Sequence[int], shots: int, tests: int, form: Callable[..., Images]) -> Task:
    """The first images of some classes of a data set, as a task."""

    def rows(labels: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        return np.concatenate([np.flatnonzero(labels == label)[:most] for label in classes])

    def part(x: Images, y: NDArray[np.int64], most: int) -> tuple[Images, NDArray[np.int64]]:
        chosen = rows(y, most)
        return form(x[chosen]), np.searchsorted(classes, y[chosen])

    names = tuple(data.class_names[label] for label in classes)
    return Task(name, source, *part(data.x, data.y, shots), *part(data.x_test, data.y_test, tests), names)


def sequence(folder: Path, shots: int, tests: int) -> tuple[list[Task], Task]:
    """Thirteen tasks, their sources taking turns, and a further one of CIFAR-100 on which hyperparameters are chosen.

    Args:
        folder: Holds ``cifar-100-binary``, ``cifar-10-batches-bin``, ``FashionMNIST/raw`` and ``fsdd/recordings``.
        shots: Training images a class, at most.
        tests: Test images a class, at most.
    """
    hundred, ten = load_cifar100(folder / "cifar-100-binary"), load_cifar10(folder / "cifar-10-batches-bin")
    fashion, digits = load_idx(folder / "FashionMNIST" / "raw"), load_wavs(folder / "fsdd" / "recordings", seconds=0.64)

    def same(images: Images) -> Images:
        return np.ascontiguousarray(images)

    of_hundred = [
        cut(hundred, "CIFAR-100", f"CIFAR-100 {i}", range(10 * i, 10 * i + 10), shots, tests, same)
        for i in range(8)
    ]  # fmt: skip
    halves: dict[str, tuple[Dataset, Callable[..., Images]]] = {
        "CIFAR-10": (ten, same), "Fashion-MNIST": (fashion, coloured), "spoken digits": (digits, pictures),
    }  # fmt: skip
    others = [
        cut(data, source, f"{source} {half}", range(5 * half, 5 * half + 5), 2 * shots, tests, form)
        for half in (0, 1)
        for source, (data, form) in halves.items()
    ]
    tasks = []
    for i, task in enumerate(of_hundred[:7]):
        tasks += [task, *others[i : i + 1]]
    return tasks, of_hundred[7]


def small_sequence() -> tuple[list[Task], Task]:
    """Three small tasks made of the Fashion-MNIST images in the package: as they are, upside down in negative, and turned."""
    data = fashion_mnist_subset()
    forms: dict[str, Callable[[Images], Images]] = {
        "plain": coloured, "negative": lambda x: 255 - coloured(x[:, ::-1]), "turned": lambda x: coloured(np.rot90(x, axes=(1, 2)))
    }  # fmt: skip
    tasks = [cut(data, name, name, range(3 * i, 3 * i + 3), 24, 12, form) for i, (name, form) in enumerate(forms.items())]
    return tasks, cut(data, "plain", "choice", (7, 8, 9), 24, 12, coloured)
