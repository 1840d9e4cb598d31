"""Streams of corrupted test images, for test-time adaptation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl.streams.corruptions.table import CORRUPTIONS, TOGETHER, check_corruption, check_severity, corrupt
from edgecl.streams.dataset import Dataset
from edgecl.streams.loaders.corrupted import CorruptedFiles
from edgecl.streams.shifts import LEAST_CONCENTRATION, SETTINGS, Stretch, in_runs, in_slots
from edgecl.streams.stream import Indices, Plan, PlannedStream, Sample, check_classes
from edgecl_device.checks import as_float32, as_int
from edgecl_device.errors import InputError


@dataclass(frozen=True, eq=False)
class Corrupted(PlannedStream):
    """The test images again and again, corrupted in another way each time; a task is a corruption.

    The training samples, clean, are the base set. Images are corrupted when they are asked for. A learner that adapts sees no label, so
    that the stream's images are the test set of their task as well, at the same severity; task 0, the base set's, is tested on clean ones.

    ================== =============================================================================================
    setting            the stream
    ================== =============================================================================================
    reset_each_shift   corruption by corruption; the learner starts anew in front of each
    continual          the same, but the learner starts anew at the beginning only, as in the settings below
    gradual            each corruption with severities 1, 2, ... up to ``severity`` and back to 1, all images at each
    mixed              one task: all corruptions at once, each image once with each, and tested with one each
    correlated         as continual, with classes that stay for a while: ``run`` or ``dirichlet`` says how long
    ================== =============================================================================================

    Attributes:
        dataset: Clean images, uint8 [N, H, W, 3] or [N, 3, H, W]; corrupted ones have its layout.
        setting: One of the above.
        corruptions: Which, in their order.
        severity: 1 to 5; of the gradual setting the highest.
        run: Of the correlated setting, least number of images of one class in a row; take more than a memory holds.
        dirichlet: Of the correlated setting, concentration of the shares of a class's images in as many slots as there are classes.
        seed: Of the corruptions and of the order.
        files: Corrupted images of a publisher (:func:`edgecl.streams.load_corrupted`), of which the data set's test images are the first;
            they are made here by default.
        stretches: Parts of the stream, with the places where the learner starts anew.

    Raises:
        InputError: when the images are no colour images of bytes, there is none, something is out of range or unknown, or files have other
            labels or images of another size.

    Source: settings as in mariodoebler/test-time-adaptation: Marsden, Döbler, Yang, Universal Test-Time Adaptation, WACV 2024.

    >>> x, y = np.full((6, 3, 32, 32), 90, np.uint8), np.arange(6) % 2
    >>> stream = Corrupted(Dataset(x, y, x, y, ("no", "yes")), corruptions=["contrast", "fog"], severity=3)
    >>> [(part.corruption[0].item(), len(part.index), part.reset) for part in stream.stretches]
    [('contrast', 6, True), ('fog', 6, False)]
    >>> len(stream), stream.tasks, next(iter(stream)).x.shape
    (12, 3, (3, 32, 32))
    """

    dataset: Dataset
    setting: str = "continual"
    corruptions: Sequence[str] = CORRUPTIONS
    severity: int = 5
    run: int | None = None
    dirichlet: float | None = None
    seed: int = 0
    files: CorruptedFiles | None = None
    stretches: tuple[Stretch, ...] = field(init=False, repr=False)
    _plan: Plan = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()
        generator = np.random.default_rng(self.seed)
        base, everything = generator.permutation(len(self.dataset.y)), np.arange(len(self.dataset.y_test))
        stretches = tuple(SETTINGS[self.setting](lambda: self._order(generator), list(self.corruptions), self.severity))
        tasks = [np.concatenate([part.index for part in stretches if part.task == task]) for task in range(stretches[-1].task + 1)]
        object.__setattr__(self, "stretches", stretches)
        object.__setattr__(self, "_plan", Plan(base, tasks, [everything] * (len(tasks) + bool(len(base)))))

    def images(self, stretch: Stretch, part: slice = slice(None)) -> NDArray[np.uint8]:
        """Images of a stretch, or of a part of it, in their order and in the data set's layout."""
        return self._made(stretch.corruption[part], stretch.severity, stretch.index[part])

    def test(self, task: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Test images [M, ...] and targets [M, ...] of one task.

        Raises:
            InputError: when there is no such task.
        """
        number = self._checked(task) - bool(len(self._plan.base))
        if number < 0:
            return super().test(task)
        index = self._plan.tests[task]
        names = np.array(self.corruptions)
        chosen = names[index % len(names)] if self.setting == "mixed" else np.full(len(index), names[number])
        return self._made(chosen, self.severity, index), self.dataset.y_test

    def __iter__(self) -> Iterator[Sample]:
        first = bool(len(self._plan.base))
        for stretch in self.stretches:
            for start in range(0, len(stretch.index), TOGETHER):
                part = slice(start, start + TOGETHER)
                for x, y in zip(self.images(stretch, part), self.dataset.y_test[stretch.index[part]], strict=True):
                    yield Sample(x, int(y) if self.dataset.kind == "class" else y, stretch.task + first)

    @property
    def _channels_first(self) -> bool:
        return bool(self.dataset.x_test.shape[3] != 3)

    def _order(self, generator: np.random.Generator) -> Indices:
        """An order of the test images."""
        if self.run is not None:
            return in_runs(self.dataset.y_test, self.run, generator)
        if self.dirichlet is not None:
            return in_slots(self.dataset.y_test, self.dirichlet, generator)
        return generator.permutation(len(self.dataset.y_test))

    def _made(self, names: NDArray[np.str_], severity: int, index: Indices) -> NDArray[np.uint8]:
        """Test images with their corruptions."""
        made = np.empty((len(index), *self.dataset.x_test.shape[1:]), np.uint8)
        for name in np.unique(names).tolist():
            mine = np.flatnonzero(names == name)
            if self.files is not None:
                images = self.files.images(name, severity, index[mine])
            else:
                clean = self.dataset.x_test[index[mine]]
                images = corrupt(
                    clean.transpose(0, 2, 3, 1) if self._channels_first else clean, name, severity, seed=self.seed, index=index[mine]
                )
            made[mine] = images.transpose(0, 3, 1, 2) if self._channels_first else images
        return made

    def _check(self) -> None:
        x = self.dataset.x_test
        if x.dtype != np.uint8 or x.ndim != 4 or 3 not in (x.shape[1], x.shape[3]) or not len(x):
            raise InputError(
                f"dataset: must have test images uint8 [N, H, W, 3] or [N, 3, H, W], got {x.dtype} {list(x.shape)}; convert or repeat them"
            )
        if self.setting not in SETTINGS:
            raise InputError(f"setting: must be one of {', '.join(SETTINGS)}, got {self.setting!r}; name one of them")
        if not len(self.corruptions) or isinstance(self.corruptions, str) or len(set(self.corruptions)) != len(self.corruptions):
            raise InputError(f"corruptions: must be different names, one at least, got {self.corruptions!r}; pass a list such as ['fog']")
        for name in self.corruptions:
            check_corruption("corruptions", name)
        check_severity("severity", self.severity)
        if as_int("seed", self.seed) < 0:
            raise InputError(f"seed: must be at least 0, got {self.seed}; pass 0")
        self._check_correlation()
        if self.files is not None:
            self._check_files(self.files)

    def _check_correlation(self) -> None:
        given = {name: value for name, value in (("run", self.run), ("dirichlet", self.dirichlet)) if value is not None}
        if len(given) != (self.setting == "correlated"):
            raise InputError(
                f"run, dirichlet: one of them must be given for the setting correlated, none for others, got {given} for {self.setting};"
                " pass run=128, say, or leave them out"
            )
        if given:
            check_classes("correlated", self.dataset)
        if self.run is not None and as_int("run", self.run) < 1:
            raise InputError(f"run: must be at least 1 image, got {self.run}; take more than a memory holds")
        if self.dirichlet is not None and as_float32("dirichlet", self.dirichlet, positive=True) < LEAST_CONCENTRATION:
            raise InputError(f"dirichlet: must be at least {LEAST_CONCENTRATION}, got {self.dirichlet}; 0.1 is usual")

    def _check_files(self, files: CorruptedFiles) -> None:
        check_classes("corrupted files", self.dataset)
        y = self.dataset.y_test
        if len(y) > len(files.labels) or (y != files.labels[: len(y)]).any():
            raise InputError(
                f"files: must have the labels of the data set's {len(y)} test images in their order, got {len(files.labels)} that"
                " differ; give the clean data set of the same files, its test images from the first on"
            )
        height, width = np.array(self.dataset.x_test.shape[1:])[[1, 2] if self._channels_first else [0, 1]].tolist()
        for name in self.corruptions:
            if name not in files.arrays:
                raise InputError(f"corruptions: must be among {', '.join(files.arrays)} in {files.folder}, got {name!r}; leave it out")
            if files.arrays[name].shape[1:3] != (height, width):
                got = f"{files.arrays[name].shape[1:3]} of {name}"
                raise InputError(f"files: images must be {height} x {width} as in the data set, got {got}; take the files of this set")
