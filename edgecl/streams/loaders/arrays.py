"""Samples of any shape with targets of any kind, from an npz archive."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgecl.streams.dataset import Dataset
from edgecl.streams.loaders._files import index
from edgecl.streams.loaders._npz import Arrays, names_of, read_npz, texts
from edgecl_device.checks import as_path
from edgecl_device.errors import InputError

REQUIRED = ("x", "y")
OPTIONAL = ("x_test", "y_test", "class_names", "group", "group_test", "group_names")

TEST_SHARE, THRESHOLD = 0.2, 0.5

EXACT = 1e-9
"""Far below one sample, far above the rounding of a product of a share and a number of samples: a fifth of five is one."""

Kind = Literal["class", "multilabel", "vector", "map"]


def load_arrays(
    path: str | Path, target: Kind | None = None, ignore: int | None = None, threshold: float | None = None, test_share: float | None = None
) -> Dataset:
    """Load samples with one class, several labels, real values or a map of classes each.

    Args:
        path: An ``.npz`` file of ``x`` (float32 or uint8 [N, ...]) and ``y`` [N, ...]; if wanted ``x_test`` and ``y_test``,
            ``class_names`` (text [K]: of classes, labels or values), and ``group``: text [N], or int64 [N], of which ``group_names`` are
            the names; with a test set also ``group_test``.
        target: What ``y`` holds; by default what its shape says: integers [N] a class, floats [N] or [N, D] values, integers or bool
            [N, K] zeros and ones, integers [N, H, W] a map.
        ignore: Of maps, the value of pixels that count for nothing.
        threshold: Of labels, the probability above which one is predicted; 0.5 by default.
        test_share: Share of the samples that are held out where there is no test set, 0.2 by default: evenly spaced in the file's order,
            within each group, so that the test set has every time, and every group of at least 1 / ``test_share`` samples.

    Raises:
        InputError: when the file is missing or damaged, lacks an array, or targets do not fit or may be of two kinds.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     x, y, who = np.zeros((10, 3), np.float32), np.zeros((10, 2), np.float32), np.array(["a", "b"] * 5)
    ...     np.savez(Path(folder) / "a.npz", x=x, y=y, group=who)
    ...     data = load_arrays(Path(folder) / "a.npz", target="vector")
    >>> data.kind, len(data.y), len(data.y_test), data.group_names, data.group_test.tolist()
    ('vector', 8, 2, ('a', 'b'), [0, 1])
    """
    place = as_path("path", path)
    if place.suffix != ".npz" or not place.is_file():
        raise InputError(f"path: must be an .npz file, got {str(path)!r}; give the path of one that is there")
    try:
        return _data(_split(read_npz(place, REQUIRED, OPTIONAL), test_share), target, ignore, threshold)
    except InputError as error:
        raise error if str(error).startswith(str(place)) else InputError(f"{place}: {error}") from error


def _split(arrays: Arrays, test_share: float | None) -> Arrays:
    """The arrays with a test set."""
    for name in ("y", "y_test", "group", "group_test"):
        found = arrays.get(name)
        if found is not None and (found.ndim == 0 or (name.startswith("group") and found.ndim != 1)):
            raise InputError(f"{name}: must have one entry for each sample, got {found.dtype} {list(found.shape)}; reshape it")
    for name in ("x", "x_test"):
        x = arrays.get(name)
        if x is not None and (x.dtype not in (np.float32, np.uint8) or x.ndim < 2 or 0 in x.shape[1:]):
            raise InputError(f"{name}: must be float32 or uint8 [N, ...], got {x.dtype} {list(x.shape)}; convert it")
        if x is not None and x.dtype == np.float32 and not np.isfinite(x).all():
            raise InputError(f"{name}: must be finite, got {np.count_nonzero(~np.isfinite(x)):,} values that are not; fill or drop them")
    if "x_test" in arrays or "y_test" in arrays:
        if missing := [name for name in ("x_test", "y_test") if name not in arrays]:
            raise InputError(f"x_test, y_test: must be given together, it lacks {missing}; give both, or neither to hold samples out")
        if test_share is not None:
            raise InputError(f"data.test_share: is for a file without a test set, got {test_share} beside x_test; leave it out")
        return _indexed(arrays)
    share = TEST_SHARE if test_share is None else test_share
    if not 0 < share <= 0.5:
        raise InputError(f"test_share: must be a share above 0 and up to 0.5, got {share}; 0.2 is usual")
    if "group_test" in arrays:
        raise InputError("group_test: is for a test set, got it without x_test; leave it out")
    count, columns = len(arrays["x"]), [name for name in ("x", "y", "group") if name in arrays]
    if wrong := [name for name in columns if len(arrays[name]) != count]:
        raise InputError(f"{', '.join(wrong)}: must have one entry for each of the {count} samples of x; cut the longer")
    groups = arrays.get("group", np.zeros(count, np.int64))
    test = np.zeros(count, bool)
    for value in np.unique(groups):
        mine = np.flatnonzero(groups == value)
        held = (np.arange(len(mine) + 1) * share + EXACT).astype(np.int64)  # so many of the first so many samples
        test[mine[np.diff(held) > 0]] = True
    parts = {name: arrays[name][~test] for name in columns} | {f"{name}_test": arrays[name][test] for name in columns}
    return _indexed({**{name: arrays[name] for name in ("class_names", "group_names") if name in arrays}, **parts})


def _indexed(arrays: Arrays) -> Arrays:
    """Groups that are text as indices, with their names."""
    sides = [name for name in ("group", "group_test") if name in arrays]
    if not sides or any(arrays[name].dtype.kind != "U" for name in sides) or "group_names" in arrays:
        return arrays
    numbers, names = index(str(text) for name in sides for text in arrays[name])
    parts = np.split(numbers, np.cumsum([len(arrays[name]) for name in sides])[:-1])
    return {**arrays, **dict(zip(sides, parts, strict=True)), "group_names": np.array(names)}


def _data(arrays: Arrays, target: str | None, ignore: int | None, threshold: float | None) -> Dataset:
    kind = target or kind_of(arrays["y"])
    if threshold is not None and kind != "multilabel":
        raise InputError(f"data.threshold: is for targets of kind multilabel, got {threshold} for {kind}; leave it out")
    y, y_test = (_plain(arrays[name], kind) for name in ("y", "y_test"))
    groups = [arrays[name] for name in ("group", "group_test") if name in arrays]
    return Dataset(
        arrays["x"],
        y,
        arrays["x_test"],
        y_test,
        class_names=_names(arrays, kind, [y, y_test], ignore),
        group=arrays.get("group"),
        group_test=arrays.get("group_test"),
        group_names=names_of(arrays, "group_names", groups),
        kind=kind,
        ignore=ignore,
        threshold=THRESHOLD if threshold is None else threshold,
    )


def kind_of(y: NDArray[Any]) -> str:
    """The kind of targets that an array's shape and type say.

    Raises:
        InputError: when they say none, or could mean two.

    >>> kind_of(np.zeros((5, 2), bool)), kind_of(np.zeros(5)), kind_of(np.zeros((5, 8, 8), np.uint8))
    ('multilabel', 'vector', 'map')
    """
    binary = bool(((y == 0) | (y == 1)).all()) if y.dtype.kind in "iubf" else False
    if y.dtype.kind == "f" and y.ndim == 2 and binary and y.size:
        raise InputError(f"data.target: must be said for floats that are all 0 or 1, {list(y.shape)}; set it to 'multilabel' or 'vector'")
    if y.dtype.kind == "f" and y.ndim in (1, 2):
        return "vector"
    found = {1: "class", 2: "multilabel", 3: "map"}.get(y.ndim) if y.dtype.kind in "iub" else None
    if found is None or (found == "multilabel" and not binary):
        got = f"{y.dtype} {list(y.shape)}" + (" beyond 0 and 1" if found else "")
        raise InputError(f"y: must be integers [N], floats [N, D], zeros and ones [N, K] or integers [N, H, W], got {got}; convert it")
    return found


def _plain(y: NDArray[Any], kind: str) -> NDArray[Any]:
    """Targets in the type that a data set has them in, real values rounded to float32; what else does not fit the data set refuses."""
    numbers = y.dtype.kind in "iub"
    if kind == "class" and numbers:
        if y.dtype.kind == "u" and y.size and y.max() > np.iinfo(np.int64).max:
            raise InputError(f"y: classes must be below 2**63, got {y.max()}; number them from 0")
        return y.astype(np.int64)
    if kind == "vector" and (numbers or y.dtype.kind == "f"):
        with np.errstate(over="ignore"):
            values = y.astype(np.float32)
        return values[:, None] if y.ndim == 1 else values
    if kind == "multilabel" and y.dtype.kind in "iubf" and ((y == 0) | (y == 1)).all():
        return y.astype(np.uint8)
    return y


def _names(arrays: Arrays, kind: str, targets: list[NDArray[Any]], ignore: int | None) -> tuple[str, ...]:
    """Names from the archive, else numbers: of classes up to the highest, of maps at least two, of labels and values all."""
    if "class_names" in arrays:
        return texts(arrays, "class_names")
    if kind in ("multilabel", "vector"):
        return tuple(map(str, range(targets[0].shape[1] if targets[0].ndim == 2 else 0)))
    if kind == "map":
        targets = [np.append(y[y != ignore].astype(np.int64), 1) for y in targets if y.dtype.kind in "iu"]
    return names_of(arrays, "class_names", targets)
